"""A queue with two hands: short calls for actors and a learner on a virtual clock."""

from __future__ import annotations

from slime_async.protocol import Reservation
from slime_async.queue import Exhausted, LeasedBatch, QueueLimits, TaskStream, TrajectoryMeta, TrajectoryQueue, Waiting
from slime_async.queue.limits import OnStale
from slime_async.trajectory import TrajectoryKey

LEARNER = 1
"""The first incarnation"""


def make_limits(
    *,
    group_size: int = 2,
    groups: int = 2,
    eta: int = 1,
    on_stale: OnStale = "mask",
    trajectories: int | None = None,
    queue_bytes: int = 1 << 20,
    trajectory_bytes: int = 1 << 10,
    max_attempts: int = 3,
    drop_equal_rewards: bool = False,
    judge_groups: bool = False,
) -> QueueLimits:
    return QueueLimits(
        group_size=group_size,
        groups_per_batch=groups,
        max_staleness=eta,
        on_stale=on_stale,
        queue_trajectories=trajectories or (eta + 1) * group_size * groups,
        queue_bytes=queue_bytes,
        max_trajectory_bytes=trajectory_bytes,
        max_attempts=max_attempts,
        drop_equal_rewards=drop_equal_rewards,
        judge_groups=judge_groups,
    )


def make_meta(
    reservation: Reservation,
    version: int = 0,
    *,
    spans: tuple[tuple[int, int], ...] | None = None,
    size_bytes: int = 100,
    reward: float = 0.0,
) -> TrajectoryMeta:
    spans = ((version, 10),) if spans is None else spans
    sampled = sum(count for _, count in spans)
    return TrajectoryMeta(
        reservation.key, reservation.attempt, sampled + 4, sampled, size_bytes, tokens_by_version=spans, reward=reward
    )


class Driver:
    """Each call takes one second."""

    def __init__(
        self, limits: QueueLimits, *, tasks: TaskStream | None = None, sources: dict[str, int] | None = None
    ) -> None:
        self.now = 0.0
        self.queue = TrajectoryQueue(limits, tasks or TaskStream({"train": 1.0}, shuffle=False))
        self.queue.declare_sources(sources or {"train": 1000, "held-out": 3})
        self.queue.learner_joined(LEARNER, 0, self.tick())
        self.publish(0)

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    def grant(self, slots: int = 1000, actor: str = "a") -> tuple[Reservation, ...]:
        return self.queue.grant(actor, slots, self.tick())

    def deliver(self, reservation: Reservation, version: int = 0, actor: str = "a", **meta: object) -> str:
        return self.queue.deliver(make_meta(reservation, version, **meta), actor, self.tick())  # type: ignore[arg-type]

    def deliver_all(self, reservations: tuple[Reservation, ...], version: int = 0, actor: str = "a") -> None:
        for reservation in reservations:
            assert self.deliver(reservation, version, actor) == "accepted"

    def fail(self, reservation: Reservation, reason: str = "environment raised") -> None:
        self.queue.fail(reservation.key, reservation.attempt, reason, self.tick())

    def ask(self, version: int, incarnation: int = LEARNER) -> LeasedBatch | Waiting | Exhausted:
        return self.queue.lease(incarnation, version, self.tick())

    def lease(self, version: int, incarnation: int = LEARNER) -> LeasedBatch:
        answer = self.ask(version, incarnation)
        assert isinstance(answer, LeasedBatch), answer
        return answer

    def commit(self, version: int, incarnation: int = LEARNER) -> None:
        self.queue.commit(incarnation, version, self.tick())

    def publish(self, version: int, incarnation: int = LEARNER) -> None:
        self.queue.publish(incarnation, version, self.tick())

    def train(self, version: int, incarnation: int = LEARNER) -> LeasedBatch:
        """Lease, commit and publish."""
        batch = self.lease(version, incarnation)
        self.commit(version, incarnation)
        self.publish(version + 1, incarnation)
        return batch


def tasks_of(batch: LeasedBatch) -> list[int]:
    return sorted({key.task for key in batch.keys})


def keys_of(reservations: tuple[Reservation, ...]) -> list[TrajectoryKey]:
    return [reservation.key for reservation in reservations]
