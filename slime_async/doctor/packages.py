"""Python and its packages: what is missing, and which versions do not fit together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from slime_async.doctor.finding import Finding, error, ok, warning
from slime_async.telemetry.environment import PACKAGES, package_version

DISTRIBUTION = "slime-async"
MINIMUM_PYTHON = (3, 11)
LINKED = ("actors", "learner", "transport")
"""Subpackages that are links in the source tree"""

Versions = Callable[[str], str | None]
"""A package's installed version, None where it is missing"""
Requirements = Callable[[str], Iterable[str]]
"""What a package says that it needs"""

SGLANG_TORCH = (("0.5.16", "0.5.18", "2.11.0"), ("0.5.18", "0.5.22", "2.13.0"), ("0.5.22", "0.5.24", "2.14.1"))
"""(from, before, torch): what each release of SGLang pins and was run with"""


def check_packages(
    versions: Versions = package_version,
    requirements: Requirements | None = None,
    python: tuple[int, ...] = sys.version_info[:3],
) -> Iterator[Finding]:
    """Everything about Python and packages."""
    needs = requirements or requirements_of
    yield _python(python)
    yield from _links()
    yield from _requirements(DISTRIBUTION, needs(DISTRIBUTION), versions, missing_matters=True)
    for name in PACKAGES:
        if versions(name) is not None:
            yield from _requirements(name, needs(name), versions, missing_matters=False)
    yield from _sglang(versions)


def requirements_of(distribution: str) -> list[str]:
    """As its metadata has them; none for what is not installed."""
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _python(version: tuple[int, ...]) -> Finding:
    text = ".".join(map(str, version))
    if version < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        return error("Python", f"{text} is too old", f"install Python {wanted} or newer, and make a new environment")
    return ok("Python", text)


def _links() -> Iterator[Finding]:
    missing = [name for name in LINKED if importlib.util.find_spec(f"slime_async.{name}") is None]
    if missing:
        yield error(
            "installation",
            f"slime_async.{missing[0]} cannot be imported: the source tree's links are not links here",
            "check the repository out with symbolic links (git config core.symlinks true), or install the wheel",
        )


def _requirements(name: str, lines: Iterable[str], versions: Versions, *, missing_matters: bool) -> Iterator[Finding]:
    """Each requirement that holds here (no extra) against what is installed; one ``ok`` when nothing is wrong."""
    wrong = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = versions(requirement.name)
        if have is None:
            if missing_matters:
                wrong.append(error("packages", f"{requirement.name} is missing", f"pip install '{requirement}'"))
        elif not requirement.specifier.contains(Version(have), prereleases=True):
            text = f"{name} needs {requirement.name}{requirement.specifier}, but {have} is installed"
            wrong.append(error("packages", text, f"pip install '{requirement.name}{requirement.specifier}'"))
    yield from wrong
    version = versions(name)
    if not wrong and version is not None:
        yield ok("packages", f"{name} {version}")


def _sglang(versions: Versions) -> Iterator[Finding]:
    """SGLang's releases run with one release of torch each; others load, and then fail in their kernels."""
    sglang, torch = versions("sglang"), versions("torch")
    if sglang is None or torch is None:
        return
    rows = [wanted for low, high, wanted in SGLANG_TORCH if Version(low) <= Version(sglang) < Version(high)]
    if not rows:
        known = f"{SGLANG_TORCH[0][0]} … below {SGLANG_TORCH[-1][1]}"
        yield warning("packages", f"SGLang {sglang} was never run with this project", f"pip install one of {known}")
    elif Version(Version(torch).public) != Version(rows[0]):
        text = f"SGLang {sglang} belongs to torch {rows[0]}, but {torch} is installed"
        yield error("packages", text, f"pip install torch=={rows[0]}, or the SGLang that belongs to torch {torch}")
