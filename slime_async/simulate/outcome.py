"""What came of a simulated run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One batch."""

    leased_s: float
    trained_s: float
    """When it was done"""
    sampled_tokens: float
    tokens: float
    """With prompts"""
    histogram: tuple[tuple[int, int], ...]
    """(staleness, sampled tokens)"""
    stale_tokens: int
    group_age: float
    """Mean over the groups: version trained − version at the group's first grant"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of the counted steps. Fractions are of their time."""

    name: str
    devices: int
    step_s: float
    samples_per_s: float
    sampled_tokens_per_s: float
    tokens_per_s_per_device: float
    """Sampled and trained"""
    learner_busy: float
    engines_busy: float
    """With any request"""
    engines_full: float
    """Tokens per second over what all engines reach with ``max_running`` requests"""
    staleness_mean: float
    staleness_max: int
    staleness: dict[int, float]
    """Share of sampled tokens by age in versions"""
    group_age_mean: float
    masked_fraction: float
    failures: int
    returned: int
    """Trajectories that were granted again after a failure"""
    bottleneck: str
    simulated_s: float
    """Virtual"""

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        ages = ", ".join(f"{age}: {share:.0%}" for age, share in self.staleness.items() if share >= 0.005)
        return [
            f"{self.name} on {self.devices} devices",
            f"  {self.samples_per_s:,.4g} samples/s, {self.sampled_tokens_per_s:,.4g} tokens/s "
            f"({self.tokens_per_s_per_device:,.4g} per device), {self.step_s:.3g} s per batch",
            f"  learner busy {self.learner_busy:.0%}, engines busy {self.engines_busy:.0%}, their rate "
            f"{self.engines_full:.0%} of a full engine's; bottleneck: {self.bottleneck}",
            f"  staleness mean {self.staleness_mean:.2f}, largest {self.staleness_max} ({ages}); "
            f"masked {self.masked_fraction:.1%}",
            f"  {self.failures} engine failures, {self.returned} trajectories granted again",
        ]


def staleness_of(steps: Sequence[Step]) -> dict[int, float]:
    """Share of sampled tokens by age."""
    tokens: dict[int, int] = {}
    for step in steps:
        for age, count in step.histogram:
            tokens[age] = tokens.get(age, 0) + count
    total = sum(tokens.values())
    return {age: tokens[age] / total for age in sorted(tokens)} if total else {}
