"""How much generation and training really ran at the same time: the point of an asynchronous trainer.

    overlap_fraction = |G ∩ T| / min(|G|, |T|)

G is when any actor computes (``generate``), T when the learner does (``train``), both within the RL phase: from the
first lease to the last commit. 1: the smaller side is hidden entirely; 0: the sides take turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slime_async.telemetry.intervals import Interval, intersection, total, union
from slime_async.telemetry.spans import Span


def overlap_fraction(generating: Iterable[Interval], training: Iterable[Interval]) -> float | None:
    """The formula above; None when one side never computed."""
    left, right = union(generating), union(training)
    smaller = min(total(left), total(right))
    return total(intersection(left, right)) / smaller if smaller else None


def rl_phase(spans: Sequence[Span]) -> Interval | None:
    """From the start of the first ``lease`` to the end of the last ``commit``; None before both exist."""
    leases = [span.start_ns for span in spans if span.name == "lease"]
    commits = [span.end_ns for span in spans if span.name == "commit"]
    return (min(leases), max(commits)) if leases and commits and min(leases) < max(commits) else None


def overlap_of_run(spans: Sequence[Span]) -> float | None:
    """``overlap_fraction`` of a run's spans; None when it has no RL phase, or one side never computed in it."""
    phase = rl_phase(spans)
    if phase is None:
        return None
    generating, training = (busy(spans, name, phase) for name in ("generate", "train"))
    return overlap_fraction(generating, training)


def busy(spans: Sequence[Span], name: str, phase: Interval) -> list[Interval]:
    """When any process was in a span of this name, within ``phase``."""
    return intersection([(span.start_ns, span.end_ns) for span in spans if span.name == name], [phase])
