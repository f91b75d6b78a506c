"""From numbers to a chart's axes: ticks that people read easily, labels, and series short enough to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

DRAWN_POINTS = 400
"""More points than a chart has pixels only make the file large"""
WANTED_TICKS = 5
LOG_FLOOR = 1e-6
"""Below this nothing is told apart on a logarithmic axis"""


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps data to 0 … 1."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``; what lies outside is cut off."""
        low, high, value = (self._scaled(x) for x in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Round numbers within the axis."""
        if self.log:
            first, last = math.ceil(self._scaled(self.low) - 1e-9), math.floor(self._scaled(self.high) + 1e-9)
            every = max(1, -(-(last - first) // WANTED_TICKS))
            return [10.0**exponent for exponent in range(first, last + 1, every)]
        step = _round_step((self.high - self.low) / WANTED_TICKS)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, LOG_FLOOR)) if self.log else value


def axis_for(values: Sequence[float], *, zero: bool = False, log: bool = False) -> Axis:
    """An axis that holds all finite values, with round ends; with ``zero`` it begins at 0 where none is below."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if log:
        ends = math.floor(math.log10(max(low, LOG_FLOOR))), math.ceil(math.log10(max(high, LOG_FLOOR)))
        return Axis(10.0 ** ends[0], 10.0 ** max(ends[1], ends[0] + 1), log=True)
    if zero:
        low = min(low, 0.0)
    if high <= low:
        low, high = (low, low + 1.0) if zero else (low - 0.5, low + 0.5)
    step = _round_step((high - low) / WANTED_TICKS)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 · 10ⁿ that is not below ``rough``."""
    if rough <= 0 or not math.isfinite(rough):
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def label(value: float) -> str:
    """Short: ``0.35``, ``12k``, ``3.2M``, ``1e-06``."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e12):
        return f"{value:.0e}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring points as one."""

    x: float
    mean: float
    low: float
    high: float


def thin(points: Sequence[tuple[float, float]], limit: int = DRAWN_POINTS) -> list[Bucket]:
    """At most ``limit`` buckets of equally many points; values that are not finite are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(finite) // limit))
    buckets = []
    for start in range(0, len(finite), size):
        part = finite[start : start + size]
        ys = [y for _, y in part]
        buckets.append(Bucket(sum(x for x, _ in part) / len(part), sum(ys) / len(ys), min(ys), max(ys)))
    return buckets
