"""Means over seeds with their confidence intervals, and what the grid comes to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.staleness_sweep.cells import METHODS, STALENESS, Cell
from benchmarks.staleness_sweep.training import CellResult

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95%, by degrees of freedom from 1"""
NORMAL_975 = 1.960
CONTROL = "none"
"""What corrections are compared with"""
MISMATCH = "mismatch/k3"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Of its 95% interval by Student's t; None for a single seed"""
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Raises ``ValueError`` without values."""
        if not values:
            raise ValueError("no values to average: ask for an estimate of finished cells only")
        n = len(values)
        if n == 1:
            return cls(values[0], None, 1)
        t = T_975[n - 2] if n - 2 < len(T_975) else NORMAL_975
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n), n)


@dataclass(frozen=True, slots=True)
class Entry:
    """One method at one staleness, over the seeds that are finished."""

    method: str
    staleness: int
    accuracy: Estimate
    """Held-out, sampled, after the last step"""
    reached: int
    """Seeds whose curve reached the target"""
    steps_to_target: Estimate | None
    """Over the seeds that reached it; None where none did"""
    gain: Estimate | None
    """Accuracy less that of ``none`` at the same η, seed by seed; None where no seed has both"""
    mismatch_kl: float | None
    """k3 of π_prox/μ, mean over batches of full staleness and seeds; None where no batch was so stale"""


def steps_to_target(result: CellResult, target: float) -> int | None:
    """The first point of the curve at or above ``target``; None when it was never reached."""
    return next((step for step, accuracy in result.curve if accuracy >= target), None)


def summarise(results: Mapping[Cell, CellResult], target: float) -> list[Entry]:
    """By method, then staleness; pairs without a finished cell are left out."""
    pairs = [(method, staleness) for method in METHODS for staleness in STALENESS]
    by_pair = {pair: {c.seed: r for c, r in results.items() if (c.method, c.staleness) == pair} for pair in pairs}
    return [_entry(pair, cells, by_pair[CONTROL, pair[1]], target) for pair, cells in by_pair.items() if cells]


def _entry(
    pair: tuple[str, int], cells: Mapping[int, CellResult], control: Mapping[int, CellResult], target: float
) -> Entry:
    """One pair's; ``cells`` and ``control`` are by seed."""
    steps = [s for result in cells.values() if (s := steps_to_target(result, target)) is not None]
    gains = [cells[seed].accuracy - control[seed].accuracy for seed in cells if seed in control]
    mismatches = [r.metrics[MISMATCH] for r in cells.values() if MISMATCH in r.metrics]
    return Entry(
        method=pair[0],
        staleness=pair[1],
        accuracy=Estimate.of([result.accuracy for result in cells.values()]),
        reached=len(steps),
        steps_to_target=Estimate.of(steps) if steps else None,
        gain=Estimate.of(gains) if gains else None,
        mismatch_kl=statistics.fmean(mismatches) if mismatches else None,
    )
