"""Sources and functions named in the configuration: found, or refused with the remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slime_async.actors.sources import load_source, load_sources
from slime_async.config.schema import SourceConfig, TaskConfig
from slime_async.objects import load_callable

MODULE = """
CONSTANT = 5
def numbers(start=0): return list(range(start, start + 3))
def generator(): return (i for i in range(3))
def mapping(): return {"a": 1}
def nothing(): return []
class Namespace:
    @staticmethod
    def pair(): return ("x", "y")
"""


@pytest.fixture(autouse=True)
def user_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules as a user would have them beside the configuration."""
    (tmp_path / "user_task.py").write_text(MODULE)
    (tmp_path / "user_broken.py").write_text("import a_library_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("user_task", "user_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_source_is_what_its_factory_returns_for_its_arguments() -> None:
    assert load_source(SourceConfig(factory="user_task:numbers", arguments={"start": 4})) == [4, 5, 6]
    assert load_source(SourceConfig(factory="user_task:Namespace.pair")) == ("x", "y")


def test_training_and_held_out_sources_are_loaded_under_their_names() -> None:
    numbers = SourceConfig(factory="user_task:numbers")
    sources = load_sources(TaskConfig(train={"a": numbers}, evaluation={"b": numbers}))
    assert {name: len(source) for name, source in sources.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("user_task", "not of the form module:name"),
        (":numbers", "not of the form module:name"),
        ("user_tsk:numbers", "no module user_tsk; install it, or put the folder that holds it on PYTHONPATH"),
        ("user_task.sub:numbers", "no module user_task.sub"),
        ("user_task:numbrs", "user_task has no numbrs; did you mean numbers?"),
        ("user_task:Namespace.pear", "Namespace has no pear; did you mean pair?"),
        ("user_task:zzz", "user_task has no zzz$"),
        ("user_task:CONSTANT", "is a int, which cannot be called"),
        ("user_task:generator", "returned a generator: a source is a sequence"),
        ("user_task:mapping", "returned a dict: a source is a sequence"),
        ("user_task:nothing", "holds no task"),
    ],
)
def test_a_factory_that_gives_no_source_is_refused_with_its_path(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_source(SourceConfig(factory=factory))
    assert factory in str(error.value)


def test_arguments_that_the_factory_does_not_take_are_named() -> None:
    with pytest.raises(ValueError, match=r"arguments \{'begin': 1\}.*unexpected keyword argument 'begin'"):
        load_source(SourceConfig(factory="user_task:numbers", arguments={"begin": 1}))


def test_an_import_that_fails_inside_the_users_module_is_reported_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_installed"):
        load_callable("user_broken:numbers", "task source")
