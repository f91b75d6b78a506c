"""The nouns of the queue: groups, batches, and what a lease answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from slime_async.queue.events import Accepted
from slime_async.queue.staleness import BatchStaleness
from slime_async.trajectory import TaskRef, TrajectoryKey


class BatchState(StrEnum):
    LEASED = "leased"
    """A learner has it and has not committed it"""
    TRAINED = "trained"
    """Committed; kept until a durable checkpoint contains it"""
    TO_RETRAIN = "to_retrain"
    """Committed by a learner that died before a durable checkpoint contained it; waits for the next learner"""


@dataclass(slots=True)
class Group:
    """The samples of one task. It is durable state: samples that are only granted don't show here."""

    task: TaskRef
    accepted: dict[int, Accepted] = field(default_factory=dict)
    """By sample"""
    rewards: tuple[float, ...] = ()
    """By sample, as the group's judge gave them; empty before, and where groups are not judged"""

    @property
    def size_bytes(self) -> int:
        return sum(accepted.meta.size_bytes for accepted in self.accepted.values())

    @property
    def keys(self) -> tuple[TrajectoryKey, ...]:
        """Of the accepted samples, ascending"""
        return tuple(TrajectoryKey(self.task.serial, sample) for sample in sorted(self.accepted))

    @property
    def oldest_version(self) -> int | None:
        """Of any sampled token; None where nothing was sampled"""
        spans = [a.meta.tokens_by_version for a in self.accepted.values() if a.meta.tokens_by_version]
        return min((s[0][0] for s in spans), default=None)

    @property
    def newest_version(self) -> int | None:
        spans = [a.meta.tokens_by_version for a in self.accepted.values() if a.meta.tokens_by_version]
        return max((s[-1][0] for s in spans), default=None)

    def rewards_equal(self) -> bool:
        rewards = self.rewards or tuple(accepted.meta.reward for accepted in self.accepted.values())
        return len(set(rewards)) == 1


@dataclass(slots=True)
class BatchRecord:
    """The groups that train one version, from their lease until they are durable."""

    train_version: int
    groups: tuple[int, ...]
    incarnation: int
    """Who leased it last"""
    state: BatchState = BatchState.LEASED
    retrained: bool = False
    """Leased anew after a learner had committed it"""

    @property
    def fixed(self) -> bool:
        """Once committed, its composition stays: every later learner trains the same again."""
        return self.retrained or self.state is not BatchState.LEASED


@dataclass(frozen=True, slots=True)
class LeasedBatch:
    """One batch for one learner; the same call gives an equal one again."""

    incarnation: int
    train_version: int
    keys: tuple[TrajectoryKey, ...]
    """B trajectories by group, oldest grant first, samples ascending"""
    rewards: tuple[float, ...]
    """In the place of the trajectories' own, where groups are judged; empty where they are not"""
    min_version: int | None
    """Tokens of versions below it have no weight in the loss; None: all train"""
    staleness: BatchStaleness
    retrained: bool
    """It was trained before, by a learner whose weights are lost"""


@dataclass(frozen=True, slots=True)
class Waiting:
    """No batch yet; ``reason`` says exactly what is missing."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exhausted:
    """No batch ever again: the tasks are used up."""

    reason: str
