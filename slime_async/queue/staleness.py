"""Staleness as it is measured: per token, in generation and in queue apart, and the lengths that the bound selects.

token's version ──── published at delivery ──── version that it trains
             in generation              in queue
             └──────────── staleness ────────────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slime_async.queue.events import Accepted
from slime_async.trajectory import NOT_SAMPLED


def stale_token_mask(token_versions: NDArray[np.int64], train_version: int, max_staleness: int) -> NDArray[np.float32]:
    """1 where a sampled token is at most ``max_staleness`` versions old, else 0; same shape as ``token_versions``.

    ``token_versions`` is as ``Trajectory.token_versions`` gives it; tokens that were not sampled get 0. Multiply the
    loss mask by it, and count denominators with the loss mask as it was before.
    """
    fresh = (train_version - token_versions <= max_staleness) & (token_versions != NOT_SAMPLED)
    return np.asarray(fresh, dtype=np.float32)


def two_sample_distance(first: Sequence[int], second: Sequence[int]) -> float:
    """The Kolmogorov–Smirnov statistic: the largest gap of the two empirical distribution functions, 0 … 1.

    0 where a sample is empty.
    """
    if not first or not second:
        return 0.0
    a, b = np.sort(np.asarray(first)), np.sort(np.asarray(second))
    points = np.concatenate([a, b])
    gaps = np.searchsorted(a, points, side="right") / len(a) - np.searchsorted(b, points, side="right") / len(b)
    return float(np.abs(gaps).max())


@dataclass(frozen=True, slots=True)
class BatchStaleness:
    """Staleness of one batch against the version that it trains; token counts are before masking."""

    histogram: tuple[tuple[int, int], ...] = ()
    """(staleness, sampled tokens), ascending"""
    in_generation: float = 0.0
    """Token-weighted mean of (published version at delivery − token's version)"""
    in_queue: float = 0.0
    """Token-weighted mean of (version trained − published version at delivery)"""
    stale_tokens: int = 0
    """Older than η: masked, or trained and counted, as ``on_stale`` says"""
    stale_trajectories: int = 0
    """All of whose tokens are older than η; under ``mask`` they count as dropped, their rewards still serve"""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.histogram)

    @property
    def mean(self) -> float:
        """Token-weighted"""
        return sum(age * count for age, count in self.histogram) / max(1, self.tokens)

    @property
    def newest(self) -> int:
        return self.histogram[0][0] if self.histogram else 0

    @property
    def oldest(self) -> int:
        return self.histogram[-1][0] if self.histogram else 0


def measure(batch: Iterable[Accepted], train_version: int, max_staleness: int) -> BatchStaleness:
    """Measure the trajectories of one batch against ``train_version`` and η."""
    counts: dict[int, int] = {}
    generation = queue = stale_tokens = stale_trajectories = 0
    for accepted in batch:
        fresh = 0
        for version, tokens in accepted.meta.tokens_by_version:
            age = max(0, train_version - version)  # below 0: weights that were lost with a learner's rollback
            counts[age] = counts.get(age, 0) + tokens
            generation += tokens * (accepted.delivered_version - version)
            queue += tokens * (train_version - accepted.delivered_version)
            if age > max_staleness:
                stale_tokens += tokens
            else:
                fresh += tokens
        if not fresh and accepted.meta.tokens_by_version:
            stale_trajectories += 1
    total = max(1, sum(counts.values()))
    return BatchStaleness(
        tuple(sorted(counts.items())), generation / total, queue / total, stale_tokens, stale_trajectories
    )
