"""The queue's durable state: the fold of its events. It decides nothing, so a replay gives what the run had."""

from __future__ import annotations

from collections.abc import Iterator

from slime_async.queue import events
from slime_async.queue.events import Accepted, Event
from slime_async.queue.limits import QueueLimits
from slime_async.queue.records import BatchRecord, BatchState, Group
from slime_async.queue.snapshot import check_shape, restore
from slime_async.queue.tasks import TaskStream
from slime_async.trajectory import TrajectoryKey


class Ledger:
    """Groups, batches and versions. Batches are consecutive: ``durable ≤ version < next_lease``.

    durable ………………… trained ………………… next_lease
       │ trained, not durable │ to retrain, or leased │
    """

    def __init__(self, limits: QueueLimits, tasks: TaskStream) -> None:
        self.limits = limits
        self.tasks = tasks
        self.published = -1
        self.awaits_weights = True
        """The present learner has published nothing yet: what the engines hold may be weights that were lost"""
        self.trained = 0
        """Batches trained in the lineage of the present weights; the version that the next commit trains"""
        self.durable = 0
        self.incarnation = -1
        self.next_evaluation_serial = -1
        self.evaluations: dict[str, events.EvaluationOpened] = {}
        self.results: dict[str, events.EvaluationFinished] = {}
        """Of those that are finished"""
        self.groups: dict[int, Group] = {}
        """By serial, all that are neither durable nor dropped"""
        self.pending: dict[int, Group] = {}
        """Those of no batch, in the order of grants"""
        self.batches: dict[int, BatchRecord] = {}
        self.totals: dict[str, int] = {}
        """Over the whole run: accepted, durable, dropped_trajectories, dropped_<reason>_groups"""
        self.complete = 0
        """Pending groups that may be leased"""
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
        return self.queued + self.limits.batch * (self.next_lease - max(self.published, 0))

    @property
    def held(self) -> int:
        """Trajectories that count against the queue's bound: pending groups in full, and leased batches"""
        return self.limits.group_size * len(self.pending) + self.limits.batch * self.leased

    def batch_groups(self, record: BatchRecord) -> Iterator[Group]:
        return (self.groups[serial] for serial in record.groups)

    def batch_bytes(self, record: BatchRecord) -> int:
        return sum(group.size_bytes for group in self.batch_groups(record))

    def ready(self, group: Group) -> bool:
        """It has all its samples, and its judge's word where it needs one."""
        return len(group.accepted) == self.limits.group_size and (bool(group.rewards) or not self.limits.judge_groups)

    def apply(self, event: Event) -> None:
        match event:
            case Accepted():
                self._accept(event)
            case events.GroupJudged():
                self._judge(event)
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
                self.published, self.awaits_weights = version, False
            case events.MadeDurable(version):
                self._make_durable(version)
            case events.LearnerJoined():
                self._join(event)
            case events.EvaluationOpened():
                self.evaluations[event.name] = event
                self.next_evaluation_serial = event.first_serial - event.num_tasks
            case events.BatchShape():
                check_shape(event, self.limits)
            case events.EvaluationFinished(name):
                self.results[name] = event
            case events.SourcesDeclared(sizes):
                self.tasks.declare_sources(sizes)
            case events.Snapshot():
                restore(self, event)

    def _accept(self, event: Accepted) -> None:
        group = self.pending[event.meta.key.task]
        group.accepted[event.meta.key.sample] = event
        self.queued += 1
        self.queued_bytes += event.meta.size_bytes
        self.largest_bytes = max(self.largest_bytes, event.meta.size_bytes)
        self.complete += self.ready(group)
        self._count("accepted", 1)

    def _judge(self, event: events.GroupJudged) -> None:
        group = self.pending[event.serial]
        group.rewards = event.rewards
        self.complete += self.ready(group)

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
        self.results.clear()
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
        self.published, self.awaits_weights = min(self.published, event.version), True

    def _end_lease(self, record: BatchRecord) -> None:
        self.leased -= 1
        self.leased_bytes -= self.batch_bytes(record)

    def _leave_queue(self, serial: int) -> Group:
        group = self.pending.pop(serial)
        self.queued -= len(group.accepted)
        self.queued_bytes -= group.size_bytes
        self.complete -= self.ready(group)
        return group

    def _return_to_queue(self, record: BatchRecord) -> None:
        returned = {group.task.serial: group for group in self.batch_groups(record)}
        self.pending = dict(sorted((self.pending | returned).items()))
        self.queued += sum(len(group.accepted) for group in returned.values())
        self.queued_bytes += sum(group.size_bytes for group in returned.values())
        self.complete += len(returned)

    def _count(self, name: str, amount: int) -> None:
        self.totals[name] = self.totals.get(name, 0) + amount
