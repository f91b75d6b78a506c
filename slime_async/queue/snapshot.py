"""The ledger as one event, and back: what a journal is compacted to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slime_async.queue.events import BatchShape, Leased, Snapshot
from slime_async.queue.limits import QueueLimits
from slime_async.queue.records import BatchRecord, BatchState, Group

if TYPE_CHECKING:
    from slime_async.queue.ledger import Ledger


def shape_of(limits: QueueLimits) -> BatchShape:
    return BatchShape(limits.group_size, limits.groups_per_batch)


def check_shape(journal: BatchShape, limits: QueueLimits) -> None:
    """Raises ``ValueError`` when a journal cannot be carried on with these limits."""
    if journal != shape_of(limits):
        raise ValueError(
            f"the journal has {journal.groups_per_batch} groups of {journal.group_size} per batch, the configuration "
            f"{limits.groups_per_batch} of {limits.group_size}: resume with the journal's numbers"
        )


def take(ledger: Ledger) -> Snapshot:
    """Everything durable; linear in the groups that are neither durable nor dropped."""
    return Snapshot(
        shape=shape_of(ledger.limits),
        published=ledger.published,
        awaits_weights=ledger.awaits_weights,
        trained=ledger.trained,
        durable=ledger.durable,
        incarnation=ledger.incarnation,
        next_evaluation_serial=ledger.next_evaluation_serial,
        largest_bytes=ledger.largest_bytes,
        tasks=ledger.tasks.state(),
        evaluations=tuple(ledger.evaluations.values()),
        results=tuple(ledger.results.values()),
        groups=tuple(
            (group.task, tuple(group.accepted[sample] for sample in sorted(group.accepted)), group.rewards)
            for _, group in sorted(ledger.groups.items())
        ),
        batches=tuple(
            (Leased(record.incarnation, record.train_version, record.groups), record.state.value, record.retrained)
            for _, record in sorted(ledger.batches.items())
        ),
        totals=dict(ledger.totals),
    )


def restore(ledger: Ledger, state: Snapshot) -> None:
    """Put ``state`` in the place of whatever ``ledger`` held; sums are counted anew."""
    check_shape(state.shape, ledger.limits)
    ledger.published, ledger.trained, ledger.durable = state.published, state.trained, state.durable
    ledger.awaits_weights = state.awaits_weights
    ledger.incarnation, ledger.next_evaluation_serial = state.incarnation, state.next_evaluation_serial
    ledger.largest_bytes = state.largest_bytes
    ledger.tasks.restore(state.tasks)
    ledger.evaluations = {evaluation.name: evaluation for evaluation in state.evaluations}
    ledger.results = {result.name: result for result in state.results}
    ledger.totals = dict(state.totals)
    ledger.groups = {
        task.serial: Group(task, {a.meta.key.sample: a for a in taken}, tuple(rewards))
        for task, taken, rewards in state.groups
    }
    ledger.batches = {
        leased.train_version: BatchRecord(
            leased.train_version, leased.groups, leased.incarnation, BatchState(status), retrained
        )
        for leased, status, retrained in state.batches
    }
    in_batches = {serial for record in ledger.batches.values() for serial in record.groups}
    ledger.pending = {serial: group for serial, group in ledger.groups.items() if serial not in in_batches}
    ledger.queued = sum(len(group.accepted) for group in ledger.pending.values())
    ledger.queued_bytes = sum(group.size_bytes for group in ledger.pending.values())
    ledger.complete = sum(ledger.ready(group) for group in ledger.pending.values())
    leased_records = [record for record in ledger.batches.values() if record.state is BatchState.LEASED]
    ledger.leased = len(leased_records)
    ledger.leased_bytes = sum(ledger.batch_bytes(record) for record in leased_records)
