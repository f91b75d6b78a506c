"""The audit's answer: counts that add up, or the trajectories that don't."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slime_async.audit.book import Book, Violation
from slime_async.audit.steps import check_steps
from slime_async.queue.events import Event


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Trajectories, where nothing else is said: ``accepted`` were trained, dropped, or are in one of three places."""

    accepted: int
    trained: int
    """In the lineage of the present weights, once each"""
    masked: int
    """Of them, without any weight in the loss: every token was beyond the staleness bound, or truncated and masked"""
    dropped: Mapping[str, int]
    """By reason"""
    queued: int
    leased: int
    to_retrain: int
    """Trained by a learner that was lost before a checkpoint; they train again"""
    batches: int
    """Trained in the lineage of the present weights"""
    durable_batches: int
    trained_again: int
    """Batches of them that were committed more than once, all but the last time in lineages that were lost"""
    rollbacks: int
    steps: int
    """Lines of the metrics that agree with their batch"""
    finished: bool
    violations: tuple[Violation, ...]

    @property
    def clean(self) -> bool:
        return not self.violations

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()))
        yield f"accepted         {self.accepted:>12,} trajectories"
        yield f"  trained once   {self.trained:>12,} in {self.batches:,} batches, {self.durable_batches:,} durable"
        if self.masked:
            yield f"    of them      {self.masked:>12,} without weight in the loss: masked as stale or truncated"
        if self.trained_again:
            yield f"    again        {self.trained_again:>12,} batches, as their first weights were lost with a learner"
        yield f"  dropped        {sum(self.dropped.values()):>12,}{f' ({reasons})' if reasons else ''}"
        yield f"  queued         {self.queued:>12,}"
        yield f"  leased         {self.leased:>12,}"
        yield f"  to train again {self.to_retrain:>12,}"
        yield f"steps            {self.steps:>12,} of the {self.batches:,} batches agree with the metrics"
        yield f"rollbacks        {self.rollbacks:>12,}"
        if self.clean:
            yield "clean: nothing lost, nothing twice" + ("" if self.finished else " so far (the run has not finished)")
        else:
            yield f"NOT CLEAN: {len(self.violations)} violation{'s' if len(self.violations) > 1 else ''}"
            yield from (f"  {violation}" for violation in self.violations)


def audit(events: Iterable[Event], metrics: Iterable[Mapping[str, Any]], finished: bool) -> AuditReport:
    """Fold ``events`` (a run's whole trail), compare with ``metrics`` (its RL steps, the last line of each).

    ``finished``: the run is over, so that nothing may be on its way any more.
    """
    book = Book()
    for event in events:
        book.apply(event)
    steps = check_steps(book, metrics, finished)
    trained, leased, to_retrain = (book.in_batches(state) for state in ("trained", "leased", "to_retrain"))
    places = trained + leased + to_retrain + book.queued + sum(book.dropped.values())
    if places != book.accepted and not book.violations:  # otherwise it follows from them
        book.violation(f"{book.accepted} trajectories were accepted, but {places} are somewhere")
    lineage = [book.batches[v] for v in range(book.first_version, book.trained) if v in book.batches]
    return AuditReport(
        accepted=book.accepted,
        trained=trained,
        masked=steps.masked,
        dropped=dict(book.dropped),
        queued=book.queued,
        leased=leased,
        to_retrain=to_retrain,
        batches=book.trained - book.first_version,
        durable_batches=book.durable - book.first_version,
        trained_again=sum(batch.commits > 1 for batch in lineage),
        rollbacks=book.rollbacks,
        steps=steps.agreeing,
        finished=finished,
        violations=tuple(book.violations),
    )
