"""What bounds the queue, checked for numbers that would let it deadlock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slime_async.config.schema import Config

OnStale = Literal["mask", "drop", "wait", "train"]

DEFAULT_QUEUE_BYTES = 4 << 30
"""Used where the configuration names no bound and one batch fits in it."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one run's queue. Raises ``ValueError`` naming the numbers that clash when they would deadlock.

    One batch of the largest trajectories must fit into ``queue_trajectories`` and ``queue_bytes``: then a queue that
    holds less than a batch always has room for the next group, whatever sizes the others turned out to have.
    """

    group_size: int
    """n"""
    groups_per_batch: int
    max_staleness: int
    """η"""
    on_stale: OnStale
    queue_trajectories: int
    """Bound on trajectories granted, queued and leased"""
    queue_bytes: int
    """Bound on bytes queued and leased; see ``TrajectoryQueue`` for how running ones count"""
    max_trajectory_bytes: int
    max_attempts: int = 8
    """A sample that failed so often takes its group with it; deaths of actors don't count"""
    drop_equal_rewards: bool = False
    """Drop complete groups whose rewards are all equal: their advantages are zero"""
    judge_groups: bool = False
    """A complete group is leased once it was judged (``TrajectoryQueue.judge``)"""

    def __post_init__(self) -> None:
        for name in ("group_size", "groups_per_batch", "max_trajectory_bytes", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness = {self.max_staleness}: must be at least 0 (0 is synchronous RL)")
        if self.queue_trajectories < self.batch:
            raise ValueError(
                f"queue_trajectories = {self.queue_trajectories} is less than one batch of {self.batch} "
                f"({self.groups_per_batch} groups of {self.group_size}): no batch could ever complete. "
                f"Set it to at least {self.batch}"
            )
        if self.max_trajectory_bytes > self.queue_bytes:
            raise ValueError(
                f"max_trajectory_bytes = {self.max_trajectory_bytes} exceeds queue_bytes = {self.queue_bytes}: "
                "the largest trajectory could never be queued. Raise queue_bytes or lower max_trajectory_bytes"
            )
        if self.max_trajectory_bytes * self.batch > self.queue_bytes:
            raise ValueError(
                f"queue_bytes = {self.queue_bytes} has no room for a batch of {self.batch} trajectories of "
                f"max_trajectory_bytes = {self.max_trajectory_bytes}: a batch of large ones could never complete. "
                f"Set queue_bytes to at least {self.max_trajectory_bytes * self.batch} "
                f"or max_trajectory_bytes to at most {self.queue_bytes // self.batch}"
            )
        if self.drop_equal_rewards and self.group_size == 1:
            raise ValueError("drop_equal_rewards with group_size = 1 would drop every group: one reward equals itself")

    @property
    def batch(self) -> int:
        """B, in trajectories"""
        return self.group_size * self.groups_per_batch

    @property
    def pacing(self) -> int:
        """``(η + 1) · B``: trajectories that may be anywhere between grant and publication"""
        return (self.max_staleness + 1) * self.batch

    def min_version(self, train_version: int) -> int | None:
        """The oldest version whose tokens may have weight in the batch that trains ``train_version``."""
        return None if self.on_stale == "train" else train_version - self.max_staleness

    @classmethod
    def from_config(cls, config: Config) -> QueueLimits:
        batch, staleness = config.batch, config.staleness
        return cls(
            group_size=batch.group_size,
            groups_per_batch=batch.groups,
            max_staleness=staleness.max_staleness,
            on_stale=staleness.on_stale,
            queue_trajectories=batch.queue_trajectories or (staleness.max_staleness + 1) * batch.trajectories,
            queue_bytes=batch.queue_bytes or max(DEFAULT_QUEUE_BYTES, batch.trajectories * batch.max_trajectory_bytes),
            max_trajectory_bytes=batch.max_trajectory_bytes,
            max_attempts=batch.max_attempts,
            drop_equal_rewards=batch.drop_equal_rewards,
            judge_groups=bool(config.task.group_reward or config.task.filter),
        )
