"""Whether another training trajectory may be granted now, and if not, what closes the gate."""

from __future__ import annotations

from typing import Literal

from slime_async.queue.admission import capacity
from slime_async.queue.ledger import Ledger
from slime_async.queue.limits import QueueLimits
from slime_async.queue.reservations import ReservationTable

GateCause = Literal["first_publication", "new_learner", "staleness", "no_sources", "no_tasks", "queue_full"]


class Gate:
    """Pacing and backpressure, read off the state.

    Pacing counts single trajectories. Backpressure admits whole groups: an open group holds room for all its samples
    from the start, so open groups can always complete, and no two of them ever wait for each other's room. In bytes,
    an accepted sample counts what it weighs and every other sample of an open group what the largest so far weighed
    (``max_trajectory_bytes`` before there was any). The bound is so exceeded only by samples already admitted that
    turn out larger than all before them. Both bounds hold a batch of the largest trajectories (``QueueLimits`` sees to
    it), so a queue that holds less than a batch, with nothing leased, always admits another group.
    """

    def __init__(self, limits: QueueLimits, ledger: Ledger, reservations: ReservationTable) -> None:
        self._limits = limits
        self._ledger = ledger
        self._reservations = reservations

    def room(self, free_slots: int) -> int:
        """Trajectories that pacing allows an actor with ``free_slots``; none before the learner's first publication."""
        if self._ledger.awaits_weights or free_slots <= 0:
            return 0
        running = self._reservations.held
        published_trajectories = self._ledger.published * self._limits.batch
        return capacity(
            version=self._ledger.published,
            batch=self._limits.batch,
            max_staleness=self._limits.max_staleness,
            accepted=self._ledger.paced + published_trajectories,
            running=running,
            max_concurrent=running + free_slots,
        )

    def closed_by_backpressure(self) -> str:
        """Which bound another group would break; empty when it fits."""
        ledger, limits = self._ledger, self._limits
        if ledger.held + limits.group_size > limits.queue_trajectories:
            return f"queue_trajectories: {ledger.held} of {limits.queue_trajectories} held"
        held_bytes = ledger.queued_bytes + ledger.leased_bytes
        expected = limits.group_size * (len(ledger.pending) + 1) - ledger.queued
        estimate = ledger.largest_bytes or limits.max_trajectory_bytes
        if held_bytes + expected * estimate > limits.queue_bytes:
            return (
                f"queue_bytes: {held_bytes} of {limits.queue_bytes} held, {expected} trajectories "
                f"of up to {estimate} to come with another group"
            )
        return ""

    def cause(self) -> GateCause | None:
        """What kind of thing keeps the next trajectory from being granted to a free slot; None when nothing does."""
        if self._ledger.published < 0:
            return "first_publication"
        if self._ledger.awaits_weights:
            return "new_learner"
        if self.room(1) <= 0:
            return "staleness"
        if self._reservations.missing:
            return None
        if not self._ledger.tasks.sizes:
            return "no_sources"
        if self._ledger.tasks.exhausted:
            return "no_tasks"
        return "queue_full" if self.closed_by_backpressure() else None

    def closed_by(self) -> str:
        """The same in words, with the numbers; empty when nothing does."""
        match self.cause():
            case "first_publication":
                return "admission closed before the first publication"
            case "new_learner":
                return f"admission closed until learner incarnation {self._ledger.incarnation} publishes its weights"
            case "staleness":
                paced = self._reservations.held + self._ledger.paced
                return f"admission closed by staleness {paced} of {self._limits.pacing}"
            case "no_sources":
                return "admission closed: no actor has declared its task sources yet"
            case "no_tasks":
                return "admission closed: no tasks are left"
            case "queue_full":
                return f"admission closed by {self.closed_by_backpressure()}"
            case None:
                return ""
