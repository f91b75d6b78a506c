"""What one node of a cluster says of itself, to be held against the others': a plain, flat record."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slime_async import __version__
from slime_async.config import Config
from slime_async.doctor.finding import Finding
from slime_async.telemetry.environment import describe_environment

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Probe:
    """What a node and the collector found out about each other."""

    clock_offset_s: float
    """The node's clock − the collector's"""
    clock_error_s: float
    """How wrong that may be: half of the fastest round trip"""
    reached_back: bool
    """Whether the collector could connect to a free port of the node"""
    sees_shared: bool
    """Whether the node finds in ``run.directory`` what the collector wrote there"""


@dataclass(frozen=True, slots=True)
class Node:
    """One node's report."""

    host: str
    python: str
    packages: Mapping[str, str]
    variables: Mapping[str, str]
    drivers: Sequence[str]
    """One per GPU"""
    gpus: Sequence[str]
    free_gib: float
    """Of the disk that ``run.directory`` is on"""
    probe: Probe
    findings: Sequence[Finding]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Node:
        """Raises ``ValueError`` for what is no report of this version."""
        try:
            findings = [Finding(**finding) for finding in table["findings"]]
            return cls(**{**table, "probe": Probe(**table["probe"]), "findings": findings})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a node's report, or another version's: {error}") from None


def describe_node(config: Config, probe: Probe, findings: Sequence[Finding]) -> Node:
    """This machine."""
    environment = describe_environment()
    existing = next(path for path in (_absolute(config), *_absolute(config).parents) if path.exists())
    return Node(
        host=environment.host,
        python=platform.python_version(),
        packages={"slime-async": __version__, **environment.packages},
        variables=environment.variables,
        drivers=[gpu.driver for gpu in environment.gpus],
        gpus=[gpu.name for gpu in environment.gpus],
        free_gib=shutil.disk_usage(existing).free / GIB,
        probe=probe,
        findings=findings,
    )


def _absolute(config: Config) -> Path:
    return config.run.directory.absolute()
