"""Statistics of repeated measurements: confidence intervals, and the two-sample test of lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slime_async.queue.staleness import two_sample_distance

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, two-sided 95%, for 1 … 10 degrees of freedom"""
T_95_LARGE = 2.0
SERIES_TERMS = 100
"""Of Kolmogorov's series, which converges long before"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the half-width of its 95% confidence interval (NaN for a single measurement)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        if math.isnan(self.half_width):
            return f"{self.mean:,.3g}"
        digits = max(0, 2 - math.floor(math.log10(abs(self.mean)))) if self.mean else 2
        return f"{self.mean:,.{digits}f} ± {self.half_width:,.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """By Student's t over independent repeats. Raises ``ValueError`` for none."""
    if not values:
        raise ValueError("there is nothing to average: no measurement")
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return Estimate(mean, math.nan)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    quantile = T_95[n - 2] if n - 1 <= len(T_95) else T_95_LARGE
    return Estimate(mean, quantile * deviation / math.sqrt(n))


def ratio(over: Estimate, under: Estimate) -> Estimate:
    """Of two independent means, by the delta method."""
    value = over.mean / under.mean
    relative = math.hypot(over.half_width / over.mean, under.half_width / under.mean)
    return Estimate(value, value * relative)


def same_distribution(first: Sequence[int], second: Sequence[int]) -> float:
    """The p-value of the two-sample Kolmogorov–Smirnov test, by its asymptotic distribution; ties make it larger."""
    if not first or not second:
        return 1.0
    n, m = len(first), len(second)
    root = math.sqrt(n * m / (n + m))
    x = (root + 0.12 + 0.11 / root) * two_sample_distance(first, second)
    if x < 0.3:
        return 1.0
    terms = ((1.0 if k % 2 else -1.0) * math.exp(-2 * (k * x) ** 2) for k in range(1, SERIES_TERMS + 1))
    return min(1.0, max(0.0, 2 * sum(terms)))
