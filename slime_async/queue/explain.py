"""In words: what the learner waits for, and what everybody waits for."""

from __future__ import annotations

from slime_async.queue.gate import Gate
from slime_async.queue.ledger import Ledger
from slime_async.queue.limits import QueueLimits
from slime_async.queue.records import Exhausted, Waiting
from slime_async.queue.reservations import ReservationTable


def explain_lease(
    limits: QueueLimits, ledger: Ledger, reservations: ReservationTable, gate: Gate
) -> Waiting | Exhausted:
    """Why there is no next batch: what is missing and who makes it, or that nobody can."""
    needed, busy = limits.groups_per_batch, reservations.busy_actors
    if ledger.tasks.exhausted and len(ledger.pending) < needed:
        return Exhausted(
            f"the tasks are used up: {len(ledger.pending)} groups are left, a batch needs {needed}. "
            "Raise the epochs or lower the number of steps"
        )
    parts = [
        f"{min(ledger.complete, needed)} of {needed} groups complete",
        f"{reservations.held} trajectories with {busy} actor{'' if busy == 1 else 's'}",
    ]
    if limits.on_stale == "wait" and ledger.complete >= needed:
        parts += _next_group(limits, ledger)
    if unjudged := sum(len(g.accepted) == limits.group_size and not ledger.ready(g) for g in ledger.pending.values()):
        parts.append(f"{unjudged} groups wait for their judge")
    parts.append(gate.closed_by() or "admission open")
    return Waiting("; ".join(parts))


def _next_group(limits: QueueLimits, ledger: Ledger) -> list[str]:
    """The first incomplete group, which all later ones wait for."""
    for serial, group in ledger.pending.items():
        lacking = limits.group_size - len(group.accepted)
        if lacking:
            return [f"the group of task {serial} leaves first and lacks {lacking} samples"]
        if not ledger.ready(group):
            return [f"the group of task {serial} leaves first and waits for its judge"]
    return []


def explain_learner(limits: QueueLimits, ledger: Ledger, reservations: ReservationTable, gate: Gate) -> str:
    """What the learner waits for, or what others wait for it to do."""
    if ledger.incarnation < 0:
        return "none has joined"
    training = f"trains batch {ledger.trained}" if ledger.leased else f"has not leased batch {ledger.trained}"
    if ledger.next_lease > ledger.trained + ledger.leased:
        return f"{training}, which was trained before"
    return f"{training}; the next batch: {explain_lease(limits, ledger, reservations, gate).reason}"
