"""The staleness-bounded queue: every transition of a trajectory's life, decided here and nowhere else.

::

    grant          start           deliver          lease          commit          make_durable
      │              │                │               │               │                 │
      ▼              ▼                ▼               ▼               ▼                 ▼
    reserved ───► running ───────► queued ───────► leased ───────► trained ────────► durable
      │              │                │               │               │
      └─ fail, lose_actor: again      └─ dropped      └──── learner_joined: leased or trained again

Pure: no I/O and no clock; ``now`` is in seconds of any clock that does not run backwards. The hub, the simulator and
the tests run this same code. Everything that must survive a restart is an event (``take_events``); write the events
before answering whoever caused them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self

from slime_async.protocol import EvaluationResult, Reservation
from slime_async.queue import events, snapshot
from slime_async.queue.evaluations import Evaluations
from slime_async.queue.events import Accepted, DropReason, Event, TrajectoryMeta
from slime_async.queue.explain import explain_learner, explain_lease
from slime_async.queue.gate import Gate, GateCause
from slime_async.queue.ledger import Ledger
from slime_async.queue.limits import QueueLimits
from slime_async.queue.records import BatchRecord, BatchState, Exhausted, Group, LeasedBatch, Waiting
from slime_async.queue.reservations import ReservationTable
from slime_async.queue.selection import select
from slime_async.queue.staleness import measure
from slime_async.queue.statistics import LeftOut, Meters, QueueStatistics, collect
from slime_async.queue.tasks import TaskStream
from slime_async.trajectory import TrajectoryKey


class TrajectoryQueue:
    """One run's queue.

    >>> limits = QueueLimits(group_size=2, groups_per_batch=1, max_staleness=0, on_stale="mask",
    ...                      queue_trajectories=2, queue_bytes=1000, max_trajectory_bytes=100)
    >>> queue = TrajectoryQueue(limits, TaskStream({"sums": 1.0}, shuffle=False))
    >>> queue.declare_sources({"sums": 10})
    >>> queue.learner_joined(incarnation=1, version=0, now=0.0)
    >>> queue.publish(incarnation=1, version=0, now=1.0)
    >>> [tuple(reservation.key) for reservation in queue.grant("actor-0", free_slots=8, now=2.0)]
    [(0, 0), (0, 1)]
    >>> queue.lease(incarnation=1, train_version=0, now=3.0).reason
    '0 of 1 groups complete; 2 trajectories with 1 actor; admission closed by staleness 2 of 2'
    """

    def __init__(self, limits: QueueLimits, tasks: TaskStream) -> None:
        self.limits = limits
        self._ledger = Ledger(limits, tasks)
        self._training = ReservationTable()
        self._evaluating = ReservationTable()
        self._evaluations = Evaluations(self._evaluating)
        self._gate = Gate(limits, self._ledger, self._training)
        self._meters = Meters()
        self._events: list[Event] = [snapshot.shape_of(limits)]

    # ------------------------------------------------------------------------------------------------ actors

    def declare_sources(self, sizes: Mapping[str, int]) -> None:
        """What an actor's ``Hello`` says of its sources. Raises ``ValueError`` when actors disagree."""
        if self._ledger.tasks.check_sources(sizes):
            self._record(events.SourcesDeclared(dict(sizes)))

    def outstanding(self, actor: str) -> int:
        """Slots of ``actor`` that its reservations take."""
        return self._training.outstanding(actor) + self._evaluating.outstanding(actor)

    def grant(self, actor: str, free_slots: int, now: float, slots: int | None = None) -> tuple[Reservation, ...]:
        """Up to ``free_slots`` new reservations: evaluations first, within their share of the actor's ``slots``, then
        missing samples of open groups, oldest first, then new groups as far as pacing and backpressure allow.

        Nothing before the present learner's first publication.
        """
        granted: list[Reservation] = []
        if self._ledger.awaits_weights:
            return ()
        share = free_slots if slots is None else self._evaluations.slots(slots) - self._evaluating.outstanding(actor)
        while len(granted) < min(free_slots, share) and (taken := self._evaluating.take(actor)):
            task, name = self._evaluations.task(taken[0])
            granted.append(Reservation(task, taken[0].sample, taken[1], name))
        for _ in range(self._gate.room(free_slots - len(granted))):
            training = self._training.take(actor) or (self._training.take(actor) if self._open_group() else None)
            if training is None:
                break
            (serial, sample), attempt = training
            granted.append(Reservation(self._ledger.groups[serial].task, sample, attempt))
        if granted:
            self._meters.moved(now)
        return tuple(granted)

    def adopt(self, actor: str, reservations: Iterable[Reservation], now: float) -> None:
        """An actor came back, to this hub or to the one that was restarted in its place, with work in progress.

        What is still missing is its again, so that nobody else is granted it; the rest only takes its slots until it
        delivers.
        """
        for reservation in reservations:
            self._table(reservation.key).adopt(reservation.key, reservation.attempt, actor)
        self._meters.moved(now)

    def start(self, key: TrajectoryKey, attempt: int, now: float) -> None:
        """Generation began. A reservation that is no longer known is ignored."""
        self._table(key).start(key, attempt)
        self._meters.moved(now)

    def deliver(self, meta: TrajectoryMeta, actor: str, now: float) -> Literal["accepted", "duplicate", "unwanted"]:
        """Take a trajectory, from whichever attempt came first; the others are duplicates.

        Raises ``ValueError`` and changes nothing when it is larger than ``max_trajectory_bytes``: the caller reports
        the attempt with ``fail``.
        """
        if meta.size_bytes > self.limits.max_trajectory_bytes:
            raise ValueError(
                f"trajectory {tuple(meta.key)} has {meta.size_bytes} bytes, more than max_trajectory_bytes = "
                f"{self.limits.max_trajectory_bytes}: raise the limit, or shorten the episodes"
            )
        self._table(meta.key).free_slot(meta.key, meta.attempt, actor)
        self._meters.moved(now)
        taken = self._accept(meta) if meta.key.task >= 0 else self._accept_evaluation(meta)
        if taken is None:
            self._meters.unwanted += 1
            return "unwanted"
        if not taken:
            self._meters.duplicates += 1
            return "duplicate"
        return "accepted"

    def fail(self, key: TrajectoryKey, attempt: int, reason: str, now: float) -> None:
        """An attempt came to nothing; its sample is granted again, up to ``max_attempts`` times in all."""
        table = self._table(key)
        failures = table.give_back(key, attempt, failed=True)
        if failures is None:
            return
        self._meters.moved(now)
        self._meters.failures += 1
        self._meters.last_failure = reason
        if failures >= self.limits.max_attempts:
            if key.task < 0:
                self._evaluations.give_up(key)
                self._finish_evaluation(key)
            else:
                self._drop(key.task, "failed")

    def groups_to_judge(self) -> tuple[int, ...]:
        """Complete groups that wait for their judge, by serial, oldest first."""
        if not self.limits.judge_groups:
            return ()
        pending = self._ledger.pending.items()
        return tuple(s for s, g in pending if len(g.accepted) == self.limits.group_size and not g.rewards)

    def judge(self, serial: int, rewards: Sequence[float], keep: bool, now: float) -> None:
        """A group's rewards, by sample, and whether to train on it. A group that is gone is ignored.

        Raises ``ValueError`` for rewards that are not one finite number per sample.
        """
        if len(rewards) != self.limits.group_size or not all(map(math.isfinite, rewards)):
            raise ValueError(
                f"the judge of task {serial} gave {list(rewards)}: it must be {self.limits.group_size} finite numbers"
            )
        group = self._ledger.pending.get(serial)
        if group is None or group.rewards:
            return
        self._record(events.GroupJudged(serial, tuple(map(float, rewards))))
        self._meters.moved(now)
        if keep:
            self._filter_equal(group)
        else:
            self._filter(group, "filtered")

    def give_up_group(self, serial: int, reason: str, now: float) -> None:
        """Its judge has failed: the group is dropped as failed."""
        if serial in self._ledger.pending:
            self._meters.failures += 1
            self._meters.last_failure = reason
            self._meters.moved(now)
            self._drop(serial, "failed")

    def lose_actor(self, actor: str, now: float) -> tuple[TrajectoryKey, ...]:
        """The actor died: the reservations it held, which are granted again to others."""
        lost = self._training.lose_actor(actor) + self._evaluating.lose_actor(actor)
        self._meters.returned += len(lost)
        self._meters.moved(now)
        return lost

    # ----------------------------------------------------------------------------------------------- learner

    def learner_joined(self, incarnation: int, version: int, now: float) -> None:
        """A learner starts from the weights of ``version``; the same incarnation again changes nothing.

        A new incarnation ends the leases of older ones. Batches from ``version`` on that were trained are handed out
        again as they were; those only leased go back to the queue; evaluations are forgotten. Raises ``ValueError``
        for an older incarnation, or a version that this queue cannot carry on from.
        """
        ledger = self._ledger
        if incarnation == ledger.incarnation:
            return
        if incarnation < ledger.incarnation:
            raise ValueError(f"incarnation {incarnation} was replaced by {ledger.incarnation}: start a new one")
        if version < ledger.durable:
            raise ValueError(
                f"the learner restarts from version {version}, but batches below {ledger.durable} were released when "
                f"checkpoint {ledger.durable} became durable: restart from that one or a later one"
            )
        if ledger.tasks.position:
            self._prove_trained(version)
        self._record(events.LearnerJoined(incarnation, version))
        self._evaluations.forget_all()
        self._meters.moved(now)

    def lease(self, incarnation: int, train_version: int, now: float) -> LeasedBatch | Waiting | Exhausted:
        """The batch that trains ``train_version``: the next one, or one ahead of it. Asking again gives it again.

        Raises ``ValueError`` for a learner that was replaced and for any other version.
        """
        self._check_learner(incarnation)
        ledger = self._ledger
        record = ledger.batches.get(train_version)
        if record is not None and record.state is not BatchState.TO_RETRAIN and record.incarnation == incarnation:
            return self._leased_batch(record)
        if ledger.leased > 1 or train_version != ledger.trained + ledger.leased:
            raise ValueError(
                f"version {train_version} cannot be leased now: {ledger.trained} batches are trained and "
                f"{ledger.leased} leased; batches are leased in order, at most one ahead of the one that trains"
            )
        groups = record.groups if record is not None else self._choose(train_version)
        if not groups:
            return explain_lease(self.limits, ledger, self._training, self._gate)
        self._record(events.Leased(incarnation, train_version, groups))
        self._meters.moved(now)
        batch = self._leased_batch(ledger.batches[train_version])
        if not batch.retrained:
            self._meters.leased(self._accepted(batch.train_version), batch.staleness, batch.min_version)
        return batch

    def commit(self, incarnation: int, train_version: int, now: float) -> None:
        """The batch is trained. Idempotent. Raises ``ValueError`` for a batch that this learner has not leased."""
        self._check_learner(incarnation)
        if train_version < self._ledger.trained:
            return
        record = self._ledger.batches.get(train_version)
        if train_version != self._ledger.trained or record is None or record.state is not BatchState.LEASED:
            raise ValueError(
                f"batch {train_version} cannot be committed: {self._ledger.trained} batches are trained and the next "
                f"{self._ledger.leased} leased; lease a batch first, and commit in order"
            )
        self._record(events.Committed(train_version))
        self._meters.moved(now)

    def publish(self, incarnation: int, version: int, now: float) -> None:
        """All engines hold ``version``: what trained it leaves the pacing count. Older versions change nothing.

        Raises ``ValueError`` for a learner that was replaced, and for weights of batches that nobody leased.
        """
        self._check_learner(incarnation)
        ledger = self._ledger
        if version < ledger.published or (version == ledger.published and not ledger.awaits_weights):
            return
        self._prove_trained(version)
        self._record(events.WeightsPublished(version))
        self._meters.moved(now)

    def make_durable(self, incarnation: int, version: int) -> None:
        """A checkpoint of ``version`` is durable: the batches below are never needed again. Idempotent.

        A run without checkpoints calls this after each commit, or keeps every payload to its end.
        """
        self._check_learner(incarnation)
        if version <= self._ledger.durable:
            return
        self._prove_trained(version)
        self._record(events.MadeDurable(version))

    # -------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, name: str, source: str, num_tasks: int, now: float, *, samples: int = 1, share: float = 1.0
    ) -> None:
        """Open an evaluation on the first ``num_tasks`` tasks of ``source`` (all, if it has fewer), ``samples`` each.

        Opening it again changes nothing. Raises ``ValueError`` for an unknown source, or other arguments than before.
        """
        sizes = self._ledger.tasks.sizes
        if samples < 1 or not 0 < share <= 1:
            raise ValueError(f"samples = {samples}, share = {share}: at least one sample, and a share in (0, 1]")
        if source not in sizes or num_tasks < 1:
            raise ValueError(
                f"cannot evaluate {num_tasks} tasks of {source!r}: the actors' sources are {sizes or 'not known yet'}"
            )
        num_tasks = min(num_tasks, sizes[source])
        known = self._ledger.evaluations.get(name)
        if known is not None:
            if (known.source, known.num_tasks, known.samples) != (source, num_tasks, samples):
                raise ValueError(
                    f"evaluation {name!r} is {known.num_tasks} tasks of {known.source!r}, not {num_tasks} of {source!r}"
                )
            return
        serial = self._ledger.next_evaluation_serial
        opened = events.EvaluationOpened(name, source, num_tasks, serial, samples, share)
        self._record(opened)
        self._evaluations.open(opened)
        self._meters.moved(now)

    def evaluation_result(self, name: str) -> EvaluationResult | None:
        """None until every task has a result or has failed for good; the rewards of those that failed are left out.

        Raises ``ValueError`` for a name that the present learner did not open.
        """
        if name not in self._ledger.evaluations:
            known = sorted(self._ledger.evaluations)
            raise ValueError(f"no evaluation {name!r}; known: {known}. Open it with evaluate first")
        result = self._ledger.results.get(name)
        if result is None:
            return None
        return EvaluationResult(result.name, result.rewards, result.failed, result.versions, result.counts)

    # ----------------------------------------------------------------------------------------- introspection

    @property
    def published_version(self) -> int:
        """−1 before the first publication"""
        return self._ledger.published

    @property
    def has_begun(self) -> bool:
        """A learner has joined: this queue, or the one that it is a replay of, has been in use"""
        return self._ledger.incarnation >= 0

    @property
    def trained_version(self) -> int:
        """Batches trained in the lineage of the present weights"""
        return self._ledger.trained

    @property
    def left_out(self) -> LeftOut:
        """What was generated for nothing, since this queue began or was replayed"""
        meters = self._meters
        return LeftOut(meters.dropped_stale_tokens, meters.filtered_groups, meters.filtered_tokens)

    def group_keys(self, serial: int) -> tuple[TrajectoryKey, ...]:
        """The accepted trajectories of a group that is neither durable nor dropped, by sample."""
        group = self._ledger.groups.get(serial)
        return group.keys if group is not None else ()

    def batch_keys(self, train_version: int) -> tuple[TrajectoryKey, ...]:
        """The trajectories of a batch that is leased, trained or to be trained again; none once it is durable."""
        record = self._ledger.batches.get(train_version)
        if record is None:
            return ()
        return tuple(key for group in self._ledger.batch_groups(record) for key in group.keys)

    def batch_metas(self, train_version: int) -> tuple[TrajectoryMeta, ...]:
        """What is known of ``batch_keys(train_version)``."""
        known = train_version in self._ledger.batches
        return tuple(accepted.meta for accepted in self._accepted(train_version)) if known else ()

    def leased_batch(self, incarnation: int, train_version: int) -> LeasedBatch | None:
        """What ``lease`` gave this learner for ``train_version``; None before, and once it is committed."""
        record = self._ledger.batches.get(train_version)
        if record is None or record.incarnation != incarnation or record.state is not BatchState.LEASED:
            return None
        return self._leased_batch(record)

    def statistics(self, now: float) -> QueueStatistics:
        return collect(self.limits, self._ledger, self._training, self._evaluating, self._meters, now)

    @property
    def evaluations_wait(self) -> bool:
        """Whether any evaluation has samples to be granted, which admission does not hold back."""
        return self._evaluating.missing > 0

    def admission_closed_by(self) -> GateCause | None:
        """What keeps free slots from being granted anything; None when nothing does."""
        return self._gate.cause()

    def waiting_for(self, now: float) -> str:
        """What everybody waits for, in words, for the watchdog's log."""
        actors = self._gate.closed_by() or "admission open: free slots are granted at once"
        learner = explain_learner(self.limits, self._ledger, self._training, self._gate)
        parts = [f"actors: {actors}", f"learner: {learner}"]
        parts += [f"evaluation {name!r} lacks {n} results" for name, n in self._evaluations.unfinished.items()]
        if self._meters.last_failure:
            parts.append(f"last of {self._meters.failures} failures: {self._meters.last_failure}")
        return "; ".join([f"nothing moved for {now - self._meters.last_moved:.0f} s", *parts])

    # --------------------------------------------------------------------------------------------- durability

    def take_events(self) -> tuple[Event, ...]:
        """Events since the last call, in order, for the journal."""
        taken = tuple(self._events)
        self._events.clear()
        return taken

    def take_released(self) -> tuple[TrajectoryKey, ...]:
        """Trajectories since the last call whose payloads the store may delete: durable or dropped.

        Payloads of evaluations and of deliveries that were not accepted are never needed by the queue.
        """
        taken = tuple(self._ledger.released)
        self._ledger.released.clear()
        return taken

    def payload_keys(self) -> tuple[TrajectoryKey, ...]:
        """Every trajectory whose payload is still needed: what a store must hold after a restart."""
        return tuple(key for group in self._ledger.groups.values() for key in group.keys)

    def state(self) -> events.Snapshot:
        """The durable state as one event; a journal may begin with it instead of everything before."""
        return snapshot.take(self._ledger)

    @classmethod
    def replay(cls, limits: QueueLimits, tasks: TaskStream, journal: Iterable[Event]) -> Self:
        """The queue after these events. Reservations in flight are not restored: their samples are granted again,
        with attempts counted anew, so that a surviving actor knows a reservation that it already works on.

        ``tasks`` is a new stream. Raises ``ValueError`` when the journal's batches have another shape.
        """
        assert tasks.position == 0, "a replay moves the stream itself"
        queue = cls(limits, tasks)
        for event in journal:
            queue._ledger.apply(event)
            queue._events.clear()  # the journal has them already
        for group in queue._ledger.pending.values():
            queue._training.add(
                TrajectoryKey(group.task.serial, sample)
                for sample in range(limits.group_size)
                if sample not in group.accepted
            )
        for name, opened in queue._ledger.evaluations.items():
            if name not in queue._ledger.results:
                queue._evaluations.open(opened)
        return queue

    # ----------------------------------------------------------------------------------------------- private

    def _record(self, event: Event) -> None:
        self._ledger.apply(event)
        self._events.append(event)

    def _table(self, key: TrajectoryKey) -> ReservationTable:
        return self._training if key.task >= 0 else self._evaluating

    def _open_group(self) -> bool:
        task = self._ledger.tasks.peek()
        if task is None or self._gate.closed_by_backpressure():
            return False
        self._record(events.GroupOpened(task))
        self._training.add(TrajectoryKey(task.serial, sample) for sample in range(self.limits.group_size))
        return True

    def _accept(self, meta: TrajectoryMeta) -> bool | None:
        """Whether it is its sample's first; None when its group is gone."""
        group = self._ledger.groups.get(meta.key.task)
        if group is None or not 0 <= meta.key.sample < self.limits.group_size:
            return None
        if meta.key.sample in group.accepted:
            return False
        self._training.close(meta.key)
        newest = meta.tokens_by_version[-1][0] if meta.tokens_by_version else self._ledger.published
        self._record(Accepted(meta, max(newest, self._ledger.published)))
        self._meters.delivered(meta)
        self._filter_equal(group)
        return True

    def _filter_equal(self, group: Group) -> None:
        if self.limits.drop_equal_rewards and self._ledger.ready(group) and group.rewards_equal():
            self._filter(group, "equal_rewards")

    def _filter(self, group: Group, reason: Literal["equal_rewards", "filtered"]) -> None:
        """Replaced by another group: what it cost is counted."""
        self._meters.filtered_groups += 1
        self._meters.filtered_tokens += sum(accepted.meta.num_sampled for accepted in group.accepted.values())
        self._drop(group.task.serial, reason)

    def _accept_evaluation(self, meta: TrajectoryMeta) -> bool | None:
        taken = self._evaluations.accept(meta)
        if taken:
            self._finish_evaluation(meta.key)
        return taken

    def _finish_evaluation(self, key: TrajectoryKey) -> None:
        if finished := self._evaluations.finish(key):
            self._record(finished)

    def _drop(self, serial: int, reason: DropReason) -> None:
        for sample in range(self.limits.group_size):
            self._training.close(TrajectoryKey(serial, sample))
        self._record(events.GroupDropped(serial, reason))

    def _check_learner(self, incarnation: int) -> None:
        if incarnation != self._ledger.incarnation:
            raise ValueError(
                f"learner incarnation {incarnation} is not the present one, {self._ledger.incarnation}: "
                "a learner joins before it leases, and stops when another has joined"
            )

    def _prove_trained(self, version: int) -> None:
        """Weights of ``version`` exist, so the batches below it are trained, even if a commit has not come yet."""
        ledger = self._ledger
        if version > ledger.trained + ledger.leased:
            raise ValueError(
                f"version {version} is ahead of the {ledger.trained} batches trained and {ledger.leased} leased here: "
                "the weights belong to another run, or the journal has lost its end"
            )
        for train_version in range(ledger.trained, version):
            self._record(events.Committed(train_version))

    def _choose(self, train_version: int) -> tuple[int, ...]:
        selection = select(self._ledger, self.limits, train_version)
        for serial in selection.stale:
            accepted = self._ledger.groups[serial].accepted.values()
            self._meters.dropped_stale_tokens += sum(a.meta.num_sampled for a in accepted)
            self._drop(serial, "stale")
        return selection.groups

    def _accepted(self, train_version: int) -> list[Accepted]:
        groups = self._ledger.batch_groups(self._ledger.batches[train_version])
        return [group.accepted[sample] for group in groups for sample in sorted(group.accepted)]

    def _leased_batch(self, record: BatchRecord) -> LeasedBatch:
        accepted = self._accepted(record.train_version)
        return LeasedBatch(
            incarnation=record.incarnation,
            train_version=record.train_version,
            keys=tuple(a.meta.key for a in accepted),
            rewards=tuple(r for group in self._ledger.batch_groups(record) for r in group.rewards),
            min_version=self.limits.min_version(record.train_version),
            staleness=measure(accepted, record.train_version, self.limits.max_staleness),
            retrained=record.retrained,
        )
