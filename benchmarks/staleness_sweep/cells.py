"""The grid: which runs there are, how each is configured, and in which order they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from slime_async.config import Config, load_config

DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"
STALENESS = (0, 1, 2, 4, 8, 16)

DEMO_CLIP = {"clip_low": 0.2, "clip_high": 0.28}
"""One clip for all methods that clip, so that they differ in their correction alone"""

METHODS: dict[str, dict[str, Any]] = {
    "none": {"preset": "none", **DEMO_CLIP},
    "tis": {"preset": "tis", **DEMO_CLIP},
    "decoupled-ppo": {"preset": "decoupled-ppo", **DEMO_CLIP},
    "icepop": {"preset": "icepop", **DEMO_CLIP},
    "m2po": {"preset": "m2po"},
    "cispo": {"preset": "cispo"},
    "ppo": {"preset": "ppo", **DEMO_CLIP},
}
"""By preset. ``ppo`` clips around the sampler (naive PPO in arXiv 2505.24298): a baseline, last of its seed to run"""
BASELINES = ("ppo",)


class Cell(NamedTuple):
    """One training run of the grid."""

    method: str
    staleness: int
    seed: int

    @property
    def name(self) -> str:
        """What ``--cells`` matches and files are called by."""
        return f"{self.method}-eta{self.staleness}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Protocol:
    """What all cells of one grid share; results of different protocols are never mixed."""

    steps: int = 120
    """Batches trained, and so the tokens of a cell"""
    groups: int = 32
    group_size: int = 8
    optimizer_steps: int = 2
    """Per batch; with one, π_θ/π_prox is 1 and the clip, CISPO's bound and π_prox itself have nothing to do"""
    learning_rate: float = 2e-4
    warm_start_steps: int = 500
    evaluate_every: int = 10
    """Steps between two points of the learning curve"""
    curve_tasks: int = 256
    """Held-out tasks per point of the curve"""
    final_tasks: int = 1024
    """Held-out tasks at the end"""

    def as_dict(self) -> dict[str, int | float]:
        return dataclasses.asdict(self)


def grid(seeds: Sequence[int], patterns: Sequence[str] = ("*",)) -> Iterator[Cell]:
    """The cells that match, one seed after the other, its baselines last: what is done first can stand alone."""
    methods = [method for method in METHODS if method not in BASELINES]
    for seed in seeds:
        for group in (methods, BASELINES):
            for staleness in STALENESS:
                cells = (Cell(method, staleness, seed) for method in group)
                yield from (cell for cell in cells if any(fnmatch(cell.name, pattern) for pattern in patterns))


def warm_start_config(seed: int, protocol: Protocol) -> Config:
    """The demo's supervised phase on its fresh model."""
    overrides: dict[tuple[str, ...], Any] = {
        ("run", "seed"): seed,
        ("warm_start", "steps"): protocol.warm_start_steps,
        ("learner", "learning_rate"): protocol.learning_rate,
    }
    return load_config(DEMO, overrides)


def cell_config(cell: Cell, protocol: Protocol, checkpoint: Path) -> Config:
    """The demo with the cell's method and staleness, from the weights in ``checkpoint``.

    ``wait`` hands out batches in the order of their grants, which with everything granted also generated makes every
    batch exactly η versions old.
    """
    overrides: dict[tuple[str, ...], Any] = {
        ("run", "seed"): cell.seed,
        ("run", "steps"): protocol.steps,
        ("model", "path"): str(checkpoint),
        ("staleness", "max_staleness"): cell.staleness,
        ("staleness", "on_stale"): "wait",
        ("batch", "groups"): protocol.groups,
        ("batch", "group_size"): protocol.group_size,
        ("algorithm",): METHODS[cell.method],
        ("learner", "optimizer_steps"): protocol.optimizer_steps,
        ("learner", "learning_rate"): protocol.learning_rate,
        ("warm_start", "steps"): 0,
    }
    return load_config(DEMO, overrides)
