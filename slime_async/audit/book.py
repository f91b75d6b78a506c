"""A second set of books: the fate of every trajectory, from the journal's events alone.

It shares no code with the queue's own fold (``slime_async.queue.ledger``) and believes none of its sums. Every event
is checked against what happened before; one that cannot be is a ``Violation``, and the books go on as well as they can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from slime_async.audit.snapshots import check_snapshot
from slime_async.queue import events
from slime_async.queue.events import DropReason, Event
from slime_async.trajectory import TrajectoryKey

KNOWN_REASONS = frozenset(get_args(DropReason))
State = Literal["leased", "trained", "to_retrain"]


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must not be; ``keys`` are the trajectories concerned, if any."""

    text: str
    keys: tuple[TrajectoryKey, ...] = ()

    def __str__(self) -> str:
        if not self.keys:
            return self.text
        shown = ", ".join(f"({key.task}, {key.sample})" for key in self.keys[:16])
        return f"{self.text}: {shown}{f' and {len(self.keys) - 16} more' if len(self.keys) > 16 else ''}"


@dataclass(slots=True)
class GroupBook:
    """One group: which samples were accepted, and where they went."""

    serial: int
    samples: dict[int, tuple[int, float]] = field(default_factory=dict)
    """(sampled tokens, reward) by sample"""
    rewards: tuple[float, ...] = ()
    """Its judge's, by sample, in the place of the samples' own"""
    batch: int | None = None
    """The version it trains; None while it is queued"""
    dropped: str | None = None

    @property
    def trained_rewards(self) -> tuple[float, ...]:
        """Those that a batch trains with, by sample"""
        return self.rewards or tuple(reward for _, (_, reward) in sorted(self.samples.items()))

    @property
    def keys(self) -> tuple[TrajectoryKey, ...]:
        return tuple(TrajectoryKey(self.serial, sample) for sample in sorted(self.samples))

    @property
    def place(self) -> str:
        if self.dropped is not None:
            return f"dropped ({self.dropped})"
        return "queued" if self.batch is None else f"in batch {self.batch}"


@dataclass(slots=True)
class BatchBook:
    """One batch of the present lineage."""

    groups: tuple[int, ...]
    state: State = "leased"
    commits: int = 0


class Book:
    """``apply`` every event in order, then ask."""

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self.shape: events.BatchShape | None = None
        self.groups: dict[int, GroupBook] = {}
        self.batches: dict[int, BatchBook] = {}
        """By version, from ``first_version`` on without a gap"""
        self.first_version = 0
        """Not 0 where the run began from another run's checkpoint"""
        self.trained = 0
        """Batches below are trained in the lineage of the present weights"""
        self.trained_ever = 0
        """The most it ever was"""
        self.durable = 0
        self.incarnation = -1
        self.rollbacks = 0
        self.num_events = 0

    def violation(self, text: str, keys: Iterable[TrajectoryKey] = ()) -> None:
        self.violations.append(Violation(text, tuple(keys)))

    def apply(self, event: Event) -> None:
        self.num_events += 1
        match event:
            case events.Accepted():
                self._accept(event)
            case events.GroupOpened(task):
                if task.serial in self.groups:
                    self.violation(f"group {task.serial} was opened twice")
                self.groups.setdefault(task.serial, GroupBook(task.serial))
            case events.GroupJudged(serial, rewards):
                self._judge(serial, rewards)
            case events.GroupDropped(serial, reason):
                self._drop(serial, reason)
            case events.Leased():
                self._lease(event)
            case events.Committed(version):
                self._commit(version)
            case events.MadeDurable(version):
                if version > self.trained:
                    self.violation(f"version {version} was made durable, but only {self.trained} batches are trained")
                self.durable = version
            case events.WeightsPublished(version):
                if version > self.trained:
                    self.violation(f"version {version} was published, but only {self.trained} batches are trained")
            case events.LearnerJoined():
                self._join(event)
            case events.BatchShape():
                if self.shape not in (None, event):
                    self.violation(f"the batch changed from {self.shape} to {event} within the run")
                self.shape = event
            case events.Snapshot():
                if self.num_events == 1:
                    self.violation("the trail begins with a snapshot: what came before it is gone")
                for text, keys in check_snapshot(self, event):
                    self.violation(text, keys)
            case events.SourcesDeclared() | events.EvaluationOpened() | events.EvaluationFinished():
                pass  # evaluations are never trained

    def keys_of(self, serials: Iterable[int]) -> Iterator[TrajectoryKey]:
        for serial in serials:
            if serial in self.groups:
                yield from self.groups[serial].keys

    @property
    def accepted(self) -> int:
        return sum(len(group.samples) for group in self.groups.values())

    @property
    def dropped(self) -> Counter[str]:
        """Trajectories by reason"""
        counts: Counter[str] = Counter()
        for group in self.groups.values():
            if group.dropped is not None:
                counts[group.dropped] += len(group.samples)
        return counts

    @property
    def queued(self) -> int:
        return sum(len(g.samples) for g in self.groups.values() if g.batch is None and g.dropped is None)

    def in_batches(self, state: State) -> int:
        """Trajectories"""
        groups = (serial for batch in self.batches.values() if batch.state == state for serial in batch.groups)
        return sum(1 for _ in self.keys_of(groups))

    # ------------------------------------------------------------------------------------------------ private

    def _accept(self, event: events.Accepted) -> None:
        key = event.meta.key
        group = self.groups.get(key.task)
        if group is None:
            self.violation("accepted for a group that was never opened", [key])
            group = self.groups.setdefault(key.task, GroupBook(key.task))
        elif group.place != "queued":
            self.violation(f"accepted when its group was already {group.place}", [key])
        if key.sample in group.samples:
            self.violation("accepted twice", [key])
        if self.shape is not None and not 0 <= key.sample < self.shape.group_size:
            self.violation(f"accepted, but groups have {self.shape.group_size} samples", [key])
        group.samples[key.sample] = (event.meta.num_sampled, event.meta.reward)

    def _judge(self, serial: int, rewards: tuple[float, ...]) -> None:
        group = self.groups.get(serial)
        if group is None:
            self.violation(f"group {serial} was judged, but never opened")
            return
        if group.place != "queued" or group.rewards:
            place = "judged" if group.place == "queued" else group.place
            self.violation(f"judged when already {place}", group.keys)
        if sorted(group.samples) != list(range(len(rewards))):
            self.violation(f"judged with {len(rewards)} rewards for {len(group.samples)} samples", group.keys)
        group.rewards = rewards

    def _drop(self, serial: int, reason: str) -> None:
        group = self.groups.get(serial)
        if group is None:
            self.violation(f"group {serial} was dropped, but never opened")
            return
        if reason not in KNOWN_REASONS:
            self.violation(f"dropped for {reason!r}, which is none of {', '.join(sorted(KNOWN_REASONS))}", group.keys)
        if group.place != "queued":
            self.violation(f"dropped ({reason}) when already {group.place}", group.keys)
        group.dropped = reason

    def _lease(self, event: events.Leased) -> None:
        version, known = event.train_version, self.batches.get(event.train_version)
        if event.incarnation != self.incarnation:
            self.violation(
                f"batch {version} went to learner {event.incarnation}, the present one is {self.incarnation}"
            )
        if known is None:
            self._new_batch(version, event.groups)
        elif known.state != "to_retrain":
            self.violation(f"batch {version} was leased when already {known.state}", self.keys_of(event.groups))
        elif known.groups != event.groups:
            different = set(known.groups) ^ set(event.groups)
            self.violation(f"batch {version} is trained again with other groups than before", self.keys_of(different))
        self.batches[version] = BatchBook(event.groups, "leased", known.commits if known else 0)

    def _new_batch(self, version: int, serials: tuple[int, ...]) -> None:
        if version != self.first_version + len(self.batches):
            self.violation(f"batch {version} was leased out of order", self.keys_of(serials))
        if self.shape is not None and len(set(serials)) != self.shape.groups_per_batch:
            self.violation(f"batch {version} has {len(set(serials))} groups, not {self.shape.groups_per_batch}")
        for serial in serials:
            group = self.groups.get(serial)
            if group is None:
                self.violation(f"batch {version} trains group {serial}, which was never opened")
                continue
            if group.batch is not None:
                self.violation(f"trained twice, in batch {group.batch} and in batch {version}", group.keys)
            elif group.dropped is not None:
                self.violation(f"dropped ({group.dropped}), then trained in batch {version}", group.keys)
            if self.shape is not None and len(group.samples) != self.shape.group_size:
                missing = [s for s in range(self.shape.group_size) if s not in group.samples]
                text = f"batch {version} trains a group without these samples, which were never accepted"
                self.violation(text, [TrajectoryKey(serial, sample) for sample in missing])
            group.batch = version

    def _commit(self, version: int) -> None:
        batch = self.batches.get(version)
        if batch is None or batch.state != "leased":
            state = "never leased" if batch is None else f"already {batch.state}"
            self.violation(f"batch {version} was committed, but {state}", self.keys_of(batch.groups if batch else ()))
        if batch is not None:
            batch.state = "trained"
            batch.commits += 1
        if version != self.trained:
            self.violation(f"batch {version} was committed when {self.trained} was next")
        self.trained = version + 1
        self.trained_ever = max(self.trained_ever, self.trained)

    def _join(self, event: events.LearnerJoined) -> None:
        """Back to the version that this learner starts from: what later ones trained is trained again."""
        if event.incarnation <= self.incarnation:
            self.violation(f"learner {event.incarnation} joined after learner {self.incarnation}")
        if not self.groups:
            self.first_version = self.durable = self.trained_ever = event.version
        elif not self.durable <= event.version <= self.trained:
            self.violation(
                f"learner {event.incarnation} began from version {event.version}, "
                f"which is not between {self.durable} (durable) and {self.trained} (trained)"
            )
        self.rollbacks += event.version < self.trained
        self.incarnation, self.trained = event.incarnation, event.version
        for version in [version for version in self.batches if version >= event.version]:
            batch = self.batches[version]
            if batch.commits:
                batch.state = "to_retrain"
                continue
            del self.batches[version]
            for serial in batch.groups:
                if serial in self.groups:
                    self.groups[serial].batch = None
