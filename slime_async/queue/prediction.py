"""Mean staleness of a trainer with a bounded queue, in closed form, from rates alone.

For choosing η and the number of slots before anything runs. It knows no pacing at admission: what it predicts is how
old data would become if actors always generated and the queue alone held them back.
"""

from __future__ import annotations

from typing import NamedTuple


class PredictedStaleness(NamedTuple):
    """In versions, mean over trajectories."""

    before_queue: float
    """While the trajectory and its group's slowest member are generated"""
    in_queue: float

    @property
    def total(self) -> float:
        return self.before_queue + self.in_queue


def predict_staleness(
    *, slots: int, batch: int, queue_batches: float, rate_ratio: float, tail_factor: float
) -> PredictedStaleness:
    """Source: Applied Compute, *Predicting and Controlling Staleness in Fully Asynchronous RL Training* (2026).

    ``slots`` C trajectories run at once, a ``batch`` B counts trajectories, ``queue_batches`` q bounds the queue, which
    drops its oldest group when full; ``rate_ratio`` ρ is what actors produce over what the learner consumes (above 1
    the learner is the bottleneck), and ``tail_factor`` M = E[longest of a group] / E[length]::

        before_queue = C·M / (B·max(1, ρ))
        in_queue     = ρ  if ρ < 1  else  (2q + ρ − 1) / 2ρ

    Raises ``ValueError`` for numbers that are not positive.
    """
    given = {
        "slots": slots,
        "batch": batch,
        "queue_batches": queue_batches,
        "rate_ratio": rate_ratio,
        "tail_factor": tail_factor,
    }
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name} = {value}: must be positive")
    before_queue = slots * tail_factor / (batch * max(1.0, rate_ratio))
    in_queue = rate_ratio if rate_ratio < 1 else (2 * queue_batches + rate_ratio - 1) / (2 * rate_ratio)
    return PredictedStaleness(before_queue, in_queue)
