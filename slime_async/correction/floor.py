"""The floor of the mismatch: what π_prox/μ is where nothing is stale, by the numerics of engine and learner alone.

A mismatch can only be judged against it: 10⁻³ is staleness where the floor is 10⁻⁶, and nothing but bfloat16 where the
floor is 10⁻³. The floor is the staleness-0 bucket of the first batch that has one, which is a run's first batch: later
on, tokens that new weights sampled over a KV cache of old ones are of staleness 0 as well, and differ for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "mismatch/"
FRESH = "/staleness_0"
"""The bucket that is nothing but numerics, as ``diagnostics`` names it"""
SUFFIX = "/floor"


class MismatchFloor:
    """Remembers the floor of each mismatch figure, by its name without the bucket."""

    def __init__(self) -> None:
        self._floor: dict[str, float] = {}

    def beside(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """``<figure>/floor`` for every mismatch figure of the whole batch in ``metrics``; none before it is known."""
        if not self._floor:
            fresh = (name for name in metrics if name.startswith(PREFIX) and name.endswith(FRESH))
            self._floor = {name.removesuffix(FRESH): metrics[name] for name in fresh}
        return {f"{name}{SUFFIX}": value for name, value in self._floor.items() if name in metrics}
