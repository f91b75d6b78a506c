from __future__ import annotations

from slime_async.queue import QueueLimits, TaskStream, TrajectoryQueue
from slime_async.queue.spread import spread_grants


def queue(groups: int, size: int = 4) -> TrajectoryQueue:
    limits = QueueLimits(
        group_size=size,
        groups_per_batch=groups,
        max_staleness=0,
        on_stale="mask",
        queue_trajectories=groups * size,
        queue_bytes=10**9,
        max_trajectory_bytes=1,
    )
    made = TrajectoryQueue(limits, TaskStream({"sums": 1.0}, shuffle=False))
    made.declare_sources({"sums": 1000})
    made.learner_joined(1, 0, 0.0)
    made.publish(1, 0, 0.0)
    return made


def counts(groups: int, slots: dict[str, int]) -> dict[str, int]:
    return {name: len(given) for name, given in spread_grants(queue(groups), slots, slots, 0.0).items()}


def test_a_batch_spreads_over_all_actors() -> None:
    assert counts(8, {"a": 64, "b": 64}) == {"a": 16, "b": 16}
    assert counts(6, {"a": 64, "b": 64, "c": 64}) == {"a": 8, "b": 8, "c": 8}


def test_the_actor_with_more_room_gets_more() -> None:
    assert counts(8, {"a": 32, "b": 8}) == {"a": 28, "b": 4}


def test_a_group_stays_together() -> None:
    granted = spread_grants(queue(8), {"a": 64, "b": 64}, {"a": 64, "b": 64}, 0.0)
    for reservations in granted.values():
        tasks = [reservation.task.serial for reservation in reservations]
        assert all(tasks.count(serial) == 4 for serial in tasks)


def test_slots_are_never_exceeded() -> None:
    assert counts(8, {"a": 3, "b": 5, "c": 0}) == {"a": 3, "b": 5}


def test_nothing_is_granted_while_admission_is_closed() -> None:
    full = queue(1)
    slots = {"a": 64}
    assert sum(map(len, spread_grants(full, slots, slots, 0.0).values())) == 4
    assert spread_grants(full, slots, slots, 0.0) == {}
