"""What an evaluation's rewards say: accuracy, mean reward and pass@k, each with how far it can be trusted.

Intervals are 95%: Wilson's for one answer per task, and from the spread between tasks where each has several (answers
to one task are alike, so they do not count as independent).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slime_async.protocol import SOLVED, EvaluationResult

Z = 1.959963984540054
"""The normal distribution's 97.5% quantile"""


@dataclass(frozen=True, slots=True)
class EvaluationStatistics:
    """Answers without a result are not solved; mean rewards leave them out."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    reward_mean: float
    """NaN where no answer has a result"""
    pass_at: dict[int, float]
    """k = 1, 2, 4, … up to the answers per task"""

    @classmethod
    def of(cls, result: EvaluationResult, samples: int) -> EvaluationStatistics:
        """``samples`` is the number of answers asked for per task."""
        solved = [sum(reward >= SOLVED for reward in rewards) for rewards in by_task(result)]
        low, high = interval(solved, samples, result.tasks)
        ks = [2**i for i in range(samples.bit_length())]
        return cls(
            accuracy=result.accuracy,
            accuracy_low=low,
            accuracy_high=high,
            reward_mean=sum(result.rewards) / len(result.rewards) if result.rewards else math.nan,
            pass_at={k: sum(pass_at_k(samples, c, k) for c in solved) / max(1, result.tasks) for k in ks},
        )


def by_task(result: EvaluationResult) -> list[tuple[float, ...]]:
    """The rewards of each task that has any count; with one answer per task, of each that has a result."""
    if not result.counts:
        return [(reward,) for reward in result.rewards]
    rewards = iter(result.rewards)
    return [tuple(next(rewards) for _ in range(count)) for count in result.counts]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of ``k`` answers is right, when ``correct`` of ``samples`` were: unbiased.

    1 − C(n − c, k) / C(n, k). Source: arXiv 2107.03374 (Codex), section 2.1.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples}: needs 0 ≤ right ≤ all and 1 ≤ k ≤ all")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def interval(solved: Sequence[int], samples: int, tasks: int) -> tuple[float, float]:
    """Of the accuracy, from the number of right answers of each task; tasks left out have none."""
    if tasks == 0:
        return 0.0, 1.0
    if samples == 1 or tasks == 1:
        return wilson(sum(solved), tasks * samples)
    rates = [count / samples for count in solved] + [0.0] * (tasks - len(solved))
    mean = sum(rates) / tasks
    variance = sum((rate - mean) ** 2 for rate in rates) / (tasks - 1)
    if variance == 0.0:
        return wilson(mean * tasks, tasks)  # all alike: the spread says nothing, so each task counts once
    half = Z * math.sqrt(variance / tasks)
    return max(0.0, mean - half), min(1.0, mean + half)


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """The score interval of a share. Source: E. B. Wilson, JASA 22 (1927)."""
    p, n = successes / trials, trials
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
