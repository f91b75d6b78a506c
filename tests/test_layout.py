"""The repository's shape: the folders of the roles are links in the one package, and everything in it imports."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from importlib.metadata import version
from pathlib import Path

import pytest
from setuptools import find_packages

import slime_async
from slime_async.learner.megatron import compat

ROOT = Path(__file__).parents[1]
NEEDS_AN_EXTRA = {"slime_async.cli.launch_ray": "ray"}
"""Module → package that the tests do without"""


@pytest.mark.parametrize("folder", ["actors", "learner", "transport"])
def test_a_roles_folder_is_linked_into_the_package(folder: str) -> None:
    link = ROOT / "slime_async" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    assert f"slime_async.{folder}" in find_packages(str(ROOT), include=["slime_async*"])


@pytest.mark.filterwarnings("default")  # what torch and megatron-core say while they are imported is not ours
def test_every_module_imports() -> None:
    names = [module.name for module in pkgutil.walk_packages(slime_async.__path__, "slime_async.")]
    assert {"slime_async.actors.worker", "slime_async.learner.role", "slime_async.transport.hub"} <= set(names)
    for name in names:
        if name not in NEEDS_AN_EXTRA or importlib.util.find_spec(NEEDS_AN_EXTRA[name]):
            importlib.import_module(name)


def test_megatron_core_is_the_version_whose_internals_we_touch() -> None:
    assert version("megatron-core") == compat.SUPPORTED_VERSION == "0.16.1"
