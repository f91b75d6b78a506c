"""The queue's durable state: the fold of its events. It decides nothing, so a replay gives what the run had."""

from __future__ import annotations

from collections.abc import Iterator

from slime_async.queue import events
from slime_async.queue.events import Accepted, Event
from slime_async.queue.limits import QueueLimits
from slime_async.queue.records import BatchRecord, BatchState, Group
from slime_async.queue.tasks import TaskStream
from slime_async.trajectory import TrajectoryKey


class Ledger:
    """Groups, batches and versions. Batches are consecutive: ``durable ≤ version < next_lease``.

    durable ………………… trained ………………… next_lease
       │ trained, not durable │ to retrain, or leased │
    """

    def __init__(self, limits: QueueLimits, tasks: TaskStream) -> None:
        self._limits = limits
        self.tasks = tasks
        self.published = -1
        self.trained = 0
        """Batches trained in the lineage of the present weights; the version that the next commit trains"""
        self.durable = 0
        self.incarnation = -1
        self.next_evaluation_serial = -1
        self.evaluations: dict[str, events.EvaluationOpened] = {}
        self.groups: dict[int, Group] = {}
        """By serial, all that are neither durable nor dropped"""
        self.pending: dict[int, Group] = {}
        """Those of no batch, in the order of grants"""
        self.batches: dict[int, BatchRecord] = {}
        self.totals: dict[str, int] = {}
        """Over the whole run: accepted, durable, dropped_trajectories, dropped_<reason>_groups"""
        self.complete = 0
        """Pending groups with all their samples"""
        self.queued = 0
        """Accepted samples of pending groups"""
        self.queued_bytes = 0
        self.leased = 0
        """Batches"""
        self.leased_bytes = 0
        self.largest_bytes = 0
        """The largest trajectory so far"""
        self.released: list[TrajectoryKey] = []
        """Payloads that nobody needs any more"""

    @property
    def next_lease(self) -> int:
        """The first version that has no batch yet"""
        return self.durable + len(self.batches)

    @property
    def paced(self) -> int:
        """Accepted trajectories whose weights are not published: queued, leased, trained, or to be trained again"""
        return self.queued + self._limits.batch * (self.next_lease - max(self.published, 0))

    @property
    def held(self) -> int:
        """Trajectories that count against the queue's bound: pending groups in full, and leased batches"""
        return self._limits.group_size * len(self.pending) + self._limits.batch * self.leased

    def batch_groups(self, record: BatchRecord) -> Iterator[Group]:
        return (self.groups[serial] for serial in record.groups)

    def batch_bytes(self, record: BatchRecord) -> int:
        return sum(group.size_bytes for group in self.batch_groups(record))

    def apply(self, event: Event) -> None:
        match event:
            case Accepted():
                self._accept(event)
            case events.GroupOpened(task):
                self.tasks.advance(task.source)
                self.groups[task.serial] = self.pending[task.serial] = Group(task)
            case events.GroupDropped():
                self._drop(event)
            case events.Leased():
                self._lease(event)
            case events.Committed(train_version):
                self._commit(self.batches[train_version])
            case events.WeightsPublished(version):
                self.published = version
            case events.MadeDurable(version):
                self._make_durable(version)
            case events.LearnerJoined():
                self._join(event)
            case events.EvaluationOpened():
                self.evaluations[event.name] = event
                self.next_evaluation_serial = event.first_serial - event.num_tasks
            case events.BatchShape():
                self._check_shape(event)
            case events.SourcesDeclared(sizes):
                self.tasks.declare_sources(sizes)
            case events.Snapshot():
                self._restore(event)

    @property
    def shape(self) -> events.BatchShape:
        return events.BatchShape(self._limits.group_size, self._limits.groups_per_batch)

    def _check_shape(self, journal: events.BatchShape) -> None:
        if journal != self.shape:
            raise ValueError(
                f"the journal has {journal.groups_per_batch} groups of {journal.group_size} per batch, the "
                f"configuration {self.shape.groups_per_batch} of {self.shape.group_size}: "
                "resume with the journal's numbers"
            )

    def _accept(self, event: Accepted) -> None:
        group = self.pending[event.meta.key.task]
        group.accepted[event.meta.key.sample] = event
        self.queued += 1
        self.queued_bytes += event.meta.size_bytes
        self.largest_bytes = max(self.largest_bytes, event.meta.size_bytes)
        self.complete += len(group.accepted) == self._limits.group_size
        self._count("accepted", 1)

    def _drop(self, event: events.GroupDropped) -> None:
        group = self._leave_queue(event.serial)
        del self.groups[event.serial]
        self.released += group.keys
        self._count("dropped_trajectories", len(group.accepted))
        self._count(f"dropped_{event.reason}_groups", 1)

    def _lease(self, event: events.Leased) -> None:
        record = self.batches.get(event.train_version)
        if record is None:
            record = BatchRecord(event.train_version, event.groups, event.incarnation)
            self.batches[event.train_version] = record
            for serial in event.groups:
                self._leave_queue(serial)
        else:
            record.retrained = True
        record.state, record.incarnation = BatchState.LEASED, event.incarnation
        self.leased += 1
        self.leased_bytes += self.batch_bytes(record)

    def _commit(self, record: BatchRecord) -> None:
        self._end_lease(record)
        record.state = BatchState.TRAINED
        self.trained = record.train_version + 1

    def _make_durable(self, version: int) -> None:
        for train_version in range(self.durable, version):
            record = self.batches.pop(train_version)
            for serial in record.groups:
                keys = self.groups.pop(serial).keys
                self.released += keys
                self._count("durable", len(keys))
        self.durable = version

    def _join(self, event: events.LearnerJoined) -> None:
        self.incarnation = event.incarnation
        self.evaluations.clear()
        if not self.groups and not self.tasks.position:
            self.durable = event.version  # a run that starts from a checkpoint of another one
        for record in [r for r in self.batches.values() if r.train_version >= event.version]:
            if record.state is BatchState.LEASED:
                self._end_lease(record)
            if record.fixed:
                record.state = BatchState.TO_RETRAIN
            else:
                del self.batches[record.train_version]
                self._return_to_queue(record)
        self.trained = event.version
        self.published = min(self.published, event.version)

    def _end_lease(self, record: BatchRecord) -> None:
        self.leased -= 1
        self.leased_bytes -= self.batch_bytes(record)

    def _leave_queue(self, serial: int) -> Group:
        group = self.pending.pop(serial)
        self.queued -= len(group.accepted)
        self.queued_bytes -= group.size_bytes
        self.complete -= len(group.accepted) == self._limits.group_size
        return group

    def _return_to_queue(self, record: BatchRecord) -> None:
        returned = {group.task.serial: group for group in self.batch_groups(record)}
        self.pending = dict(sorted((self.pending | returned).items()))
        self.queued += sum(len(group.accepted) for group in returned.values())
        self.queued_bytes += sum(group.size_bytes for group in returned.values())
        self.complete += len(returned)

    def _count(self, name: str, amount: int) -> None:
        self.totals[name] = self.totals.get(name, 0) + amount

    def snapshot(self) -> events.Snapshot:
        return events.Snapshot(
            shape=self.shape,
            published=self.published,
            trained=self.trained,
            durable=self.durable,
            incarnation=self.incarnation,
            next_evaluation_serial=self.next_evaluation_serial,
            largest_bytes=self.largest_bytes,
            tasks=self.tasks.state(),
            evaluations=tuple(self.evaluations.values()),
            groups=tuple(
                (group.task, tuple(group.accepted[sample] for sample in sorted(group.accepted)))
                for _, group in sorted(self.groups.items())
            ),
            batches=tuple(
                (events.Leased(r.incarnation, r.train_version, r.groups), r.state.value, r.retrained)
                for _, r in sorted(self.batches.items())
            ),
            totals=dict(self.totals),
        )

    def _restore(self, state: events.Snapshot) -> None:
        self._check_shape(state.shape)
        self.published, self.trained, self.durable = state.published, state.trained, state.durable
        self.incarnation, self.next_evaluation_serial = state.incarnation, state.next_evaluation_serial
        self.largest_bytes = state.largest_bytes
        self.tasks.restore(state.tasks)
        self.evaluations = {evaluation.name: evaluation for evaluation in state.evaluations}
        self.totals = dict(state.totals)
        self.groups = {task.serial: Group(task, {a.meta.key.sample: a for a in taken}) for task, taken in state.groups}
        self.batches = {
            leased.train_version: BatchRecord(
                leased.train_version, leased.groups, leased.incarnation, BatchState(status), retrained
            )
            for leased, status, retrained in state.batches
        }
        in_batches = {serial for record in self.batches.values() for serial in record.groups}
        self.pending = {serial: group for serial, group in self.groups.items() if serial not in in_batches}
        self.queued = sum(len(group.accepted) for group in self.pending.values())
        self.queued_bytes = sum(group.size_bytes for group in self.pending.values())
        self.complete = sum(len(g.accepted) == self._limits.group_size for g in self.pending.values())
        leased_records = [record for record in self.batches.values() if record.state is BatchState.LEASED]
        self.leased = len(leased_records)
        self.leased_bytes = sum(self.batch_bytes(record) for record in leased_records)
