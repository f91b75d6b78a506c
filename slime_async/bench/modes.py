"""The modes: one configuration, and the few fields in which each of them departs from it.

==============  ===  ================  ===================================================================
mode            η    published         devices
==============  ===  ================  ===================================================================
colocated       0    in flight         all generate, then all train: engines and learner share every one
disaggregated   0    in flight         separate: the learner's rest while actors generate, and vice versa
one-step-off    1    batch boundary    separate
async-η         η    in flight         separate
==============  ===  ================  ===================================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_async.config import Config, ConfigError

SYNCHRONOUS = ("colocated", "disaggregated")
STEPS_WITHOUT_END = 1_000_000
"""What ends the run of a mode is its time"""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of training, on given devices."""

    name: str
    max_staleness: int
    publish: str
    learner_devices: tuple[int, ...]
    actor_devices: tuple[int, ...]
    """One actor with one engine on each; with engines of several ranks, on the first of each engine's"""
    engine_ranks: int = 1

    @property
    def colocated(self) -> bool:
        return bool(set(self.learner_devices) & set(self.actor_devices))

    @property
    def synchronous(self) -> bool:
        return self.max_staleness == 0

    @property
    def devices(self) -> tuple[int, ...]:
        """All that either side uses."""
        engines = {first + rank for first in self.actor_devices for rank in range(self.engine_ranks)}
        return tuple(sorted(engines | set(self.learner_devices)))

    @property
    def layout(self) -> str:
        """In words."""
        if self.colocated:
            return f"{len(self.devices)} shared"
        return f"{len(self.learner_devices)}+{len(self.actor_devices) * self.engine_ranks}"


def modes_of(config: Config) -> list[Mode]:
    """Every mode of ``bench.modes``, those that separate the devices once per split. Raises ``ConfigError``."""
    bench, ranks = config.bench, engine_ranks(config)
    splits = [_split(text, bench.devices) for text in bench.splits]
    found: list[Mode] = []
    for name in bench.modes:
        eta, publish = _meaning(name)
        everything = tuple(range(bench.devices))
        if name == "colocated":
            found.append(Mode(name, eta, publish, everything, _first_ranks(everything, ranks), ranks))
            continue
        for learners, actors in splits:
            label = name if len(splits) == 1 else f"{name} {learners}:{actors}"
            engines = _first_ranks(everything[learners:], ranks)
            found.append(Mode(label, eta, publish, everything[:learners], engines, ranks))
    if repeated := {mode.name for mode in found if sum(other.name == mode.name for other in found) > 1}:
        raise ConfigError(f"bench.modes or bench.splits name {sorted(repeated)} more than once")
    return found


def engine_ranks(config: Config) -> int:
    """Devices of one engine."""
    sizes = [int(config.sglang.get(name, 1)) for name in ("tp_size", "tp", "pp_size", "pp")]
    return sizes[0] * sizes[1] * sizes[2] * sizes[3]


def configure(config: Config, mode: Mode, directory: Path, time_limit_s: float) -> Config:
    """The configuration of one mode's run. What it sets here is all in which modes may differ."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={
                    "name": mode.name.replace(" ", "-").replace(":", "-"),
                    "directory": directory,
                    "steps": STEPS_WITHOUT_END,
                    "time_limit_s": time_limit_s,
                    "view": "lines",
                }
            ),
            "staleness": config.staleness.model_copy(update={"max_staleness": mode.max_staleness}),
            "weights": config.weights.model_copy(update={"publish": mode.publish, "backend": _carrier(config, mode)}),
            "learner": config.learner.model_copy(update={"ranks": len(mode.learner_devices), "max_restarts": 0}),
            "actor": config.actor.model_copy(update={"count": len(mode.actor_devices), "max_restarts": 0}),
            "evaluation": config.evaluation.model_copy(update={"before": False, "after": False}),
        }
    )


VARIED = (
    "run.name",
    "run.directory",
    "staleness.max_staleness",
    "weights.publish",
    "weights.backend",
    "learner.ranks",
    "actor.count",
)
"""Keys in which the configurations of two modes may differ"""


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Dotted keys in which two flattened configurations differ and must not."""
    keys = first.keys() | second.keys()
    return sorted(key for key in keys if first.get(key) != second.get(key) and key not in VARIED)


def on_gpus(config: Config) -> bool:
    """Whether devices are GPUs; otherwise they are CPU cores."""
    return config.actor.engine == "sglang" or config.actor.device != "cpu"


def _carrier(config: Config, mode: Mode) -> str:
    """Two ranks of one NCCL communicator cannot share a GPU."""
    return "ipc" if mode.colocated and on_gpus(config) else config.weights.backend


def _meaning(name: str) -> tuple[int, str]:
    if name in SYNCHRONOUS:
        return 0, "in_flight"
    if name == "one-step-off":
        return 1, "batch_boundary"
    if found := re.fullmatch(r"async-([1-9]\d*)", name):
        return int(found[1]), "in_flight"
    known = ", ".join((*SYNCHRONOUS, "one-step-off", "async-1, async-2 … for any η"))
    raise ConfigError(f"bench.modes names {name!r}, which is no mode: {known}")


def _split(text: str, devices: int) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    learners, actors = (int(found[1]), int(found[2])) if found else (0, 0)
    if not learners or not actors or learners + actors != devices:
        raise ConfigError(
            f"bench.splits names {text!r}: write LEARNER:ACTORS, both at least 1, that add up to bench.devices = "
            f"{devices}: every mode gets the same devices"
        )
    return learners, actors


def _first_ranks(devices: Sequence[int], ranks: int) -> tuple[int, ...]:
    if len(devices) % ranks:
        raise ConfigError(f"{len(devices)} devices cannot be shared by engines of {ranks} each: change bench.splits")
    return tuple(devices[::ranks])
