"""A trajectory's life, from its reservation to a durable checkpoint."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest
from queue_driver import LEARNER, Driver, keys_of, make_limits, make_meta, tasks_of

from slime_async.queue import TaskStream, TrajectoryMeta, TrajectoryQueue, Waiting
from slime_async.trajectory import TaskRef, Trajectory, TrajectoryKey, VersionSpan, WeightId


def test_nothing_is_granted_before_the_first_publication() -> None:
    queue = TrajectoryQueue(make_limits(), TaskStream({"train": 1.0}))
    queue.declare_sources({"train": 100})
    queue.learner_joined(LEARNER, 0, 0.0)
    assert queue.grant("a", 100, 1.0) == ()
    queue.publish(LEARNER, 0, 2.0)
    assert len(queue.grant("a", 100, 3.0)) == 8


def test_a_trajectory_lives_from_reserved_to_durable() -> None:
    drive = Driver(make_limits())
    granted = drive.grant(4)
    assert drive.queue.statistics(0.0).reserved == 4
    for reservation in granted:
        drive.queue.start(reservation.key, reservation.attempt, drive.tick())
    assert drive.queue.statistics(0.0).running == 4
    drive.deliver_all(granted)
    assert drive.queue.statistics(0.0).queued == 4
    batch = drive.lease(0)
    assert list(batch.keys) == keys_of(granted)
    assert drive.queue.statistics(0.0).leased == 4
    drive.commit(0)
    assert drive.queue.statistics(0.0).trained == 4
    assert drive.queue.take_released() == ()
    drive.queue.make_durable(LEARNER, 1)
    assert drive.queue.statistics(0.0).durable == 4
    assert list(drive.queue.take_released()) == keys_of(granted)


def test_pacing_counts_until_the_weights_are_published() -> None:
    drive = Driver(make_limits(eta=1))
    drive.deliver_all(drive.grant())
    assert drive.grant() == ()
    drive.lease(0)
    assert drive.grant() == ()
    drive.commit(0)
    assert drive.grant() == ()
    drive.publish(1)
    assert len(drive.grant()) == 4


def test_open_groups_are_completed_before_new_ones_are_opened() -> None:
    drive = Driver(make_limits(eta=3))
    first = drive.grant(3)
    drive.fail(first[1])
    second = drive.grant(3)
    assert [tuple(r.key) for r in second] == [(0, 1), (1, 1), (2, 0)]
    assert [r.attempt for r in second] == [1, 0, 0]


def test_a_dead_actor_returns_its_reservations() -> None:
    drive = Driver(make_limits())
    kept, *lost = drive.grant(4, "dead")
    assert drive.deliver(kept, actor="dead") == "accepted"
    assert drive.queue.lose_actor("dead", drive.tick()) == tuple(keys_of(tuple(lost)))
    again = drive.grant(3, "alive")
    assert keys_of(again) == keys_of(tuple(lost))
    assert {r.attempt for r in again} == {1}


def test_the_first_accepted_attempt_counts_even_from_an_actor_thought_dead() -> None:
    drive = Driver(make_limits())
    (first,) = drive.grant(1, "dead")
    drive.queue.lose_actor("dead", drive.tick())
    (second,) = drive.grant(1, "alive")
    assert drive.deliver(first, actor="dead") == "accepted"
    assert drive.queue.outstanding("alive") == 1
    assert drive.queue.statistics(0.0).reserved == 0
    assert drive.deliver(second, actor="alive") == "duplicate"
    assert drive.deliver(first, actor="dead") == "duplicate"
    assert drive.queue.outstanding("alive") == 0


def test_a_sample_that_keeps_failing_takes_its_group_with_it() -> None:
    drive = Driver(make_limits(max_attempts=3))
    good, bad = drive.grant(2)
    assert drive.deliver(good) == "accepted"
    for _ in range(3):
        drive.fail(bad)
        (bad,) = drive.grant(1)
    assert tuple(bad.key) == (1, 0)
    statistics = drive.queue.statistics(0.0)
    assert (statistics.dropped_failed_groups, statistics.dropped, statistics.failures) == (1, 1, 3)
    assert drive.queue.take_released() == (good.key,)
    assert drive.deliver(good) == "unwanted"


def test_deaths_of_actors_do_not_count_as_failures() -> None:
    drive = Driver(make_limits(max_attempts=2))
    for attempt in range(10):
        (reservation,) = drive.grant(1)
        assert (tuple(reservation.key), reservation.attempt) == ((0, 0), attempt)
        drive.queue.lose_actor("a", drive.tick())


def test_a_dropped_group_keeps_the_slots_of_actors_that_still_work_on_it() -> None:
    drive = Driver(make_limits(max_attempts=1))
    bad, running = drive.grant(2)
    drive.fail(bad)
    assert drive.queue.outstanding("a") == 1
    assert drive.queue.statistics(0.0).pacing == 0
    assert drive.deliver(running) == "unwanted"
    assert drive.queue.outstanding("a") == 0


def test_groups_leave_oldest_first_and_only_when_complete() -> None:
    drive = Driver(make_limits(eta=2))
    granted = drive.grant()
    for index in (11, 10, 5, 4, 0, 2, 3):
        drive.deliver(granted[index])
    assert tasks_of(drive.lease(0)) == [1, 2]


def test_equal_rewards_drop_a_group_when_the_filter_is_on() -> None:
    drive = Driver(make_limits(drop_equal_rewards=True))
    granted = drive.grant(4)
    for reservation, reward in zip(granted, (1.0, 1.0, 0.0, 1.0), strict=True):
        assert drive.deliver(reservation, reward=reward) == "accepted"
    statistics = drive.queue.statistics(0.0)
    assert (statistics.dropped_equal_rewards_groups, statistics.complete_groups, statistics.pacing) == (1, 1, 2)


def test_a_lease_repeats_and_a_commit_repeats() -> None:
    drive = Driver(make_limits())
    drive.deliver_all(drive.grant())
    batch = drive.lease(0)
    assert drive.lease(0) == batch
    ahead = drive.lease(1)
    drive.commit(0)
    drive.commit(0)
    assert (drive.lease(0), drive.lease(1)) == (batch, ahead)


def test_at_most_one_batch_is_leased_ahead_and_commits_are_in_order() -> None:
    drive = Driver(make_limits(eta=2))
    drive.deliver_all(drive.grant())
    with pytest.raises(ValueError, match="at most one ahead"):
        drive.ask(1)
    drive.lease(0)
    drive.lease(1)
    with pytest.raises(ValueError, match="at most one ahead"):
        drive.ask(2)
    with pytest.raises(ValueError, match="commit in order"):
        drive.commit(1)


def test_waiting_says_exactly_what_is_missing() -> None:
    drive = Driver(make_limits(group_size=8, groups=32, eta=2))
    granted = drive.grant()
    drive.deliver_all(granted[: 21 * 8])
    answer = drive.ask(0)
    assert isinstance(answer, Waiting)
    assert answer.reason == (
        "21 of 32 groups complete; 600 trajectories with 1 actor; admission closed by staleness 768 of 768"
    )
    assert drive.queue.waiting_for(drive.now + 60) == (
        f"nothing moved for 61 s; actors: admission closed by staleness 768 of 768; "
        f"learner: has not leased batch 0; the next batch: {answer.reason}"
    )


def test_a_publication_proves_its_commit() -> None:
    drive = Driver(make_limits())
    drive.deliver_all(drive.grant())
    drive.lease(0)
    drive.publish(1)
    assert drive.queue.trained_version == 1
    drive.commit(0)
    with pytest.raises(ValueError, match="ahead of the 1 batches trained"):
        drive.publish(2)


def test_a_trajectory_that_is_too_large_is_refused_and_changes_nothing() -> None:
    drive = Driver(make_limits(trajectory_bytes=1000))
    (reservation, *_) = drive.grant()
    before = drive.queue.statistics(0.0)
    with pytest.raises(ValueError, match="1001 bytes, more than max_trajectory_bytes = 1000"):
        drive.queue.deliver(make_meta(reservation, size_bytes=1001), "a", drive.now)
    assert drive.queue.statistics(0.0) == before


def test_unknown_keys_are_unwanted_and_their_notes_ignored() -> None:
    drive = Driver(make_limits())
    (reservation,) = drive.grant(1)
    for key in (TrajectoryKey(7, 0), TrajectoryKey(0, 2), TrajectoryKey(-5, 0)):
        drive.queue.start(key, 0, drive.tick())
        drive.queue.fail(key, 0, "?", drive.tick())
    assert drive.queue.statistics(0.0).failures == 0
    drive.queue.start(reservation.key, 5, drive.tick())
    assert drive.queue.statistics(0.0).running == 0


def test_a_finite_stream_that_runs_out_says_so() -> None:
    limits = make_limits()
    drive = Driver(limits, tasks=TaskStream({"train": 1.0}, epochs=1), sources={"train": 3})
    drive.deliver_all(drive.grant())
    drive.train(0)
    answer = drive.ask(1)
    assert type(answer).__name__ == "Exhausted"
    assert "1 groups are left, a batch needs 2" in answer.reason  # type: ignore[union-attr]


def test_the_queue_knows_a_trajectory_by_its_meta() -> None:
    trajectory = Trajectory(
        task=TaskRef(3, "train", 0),
        sample=1,
        attempt=2,
        token_ids=np.arange(6, dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 1, 0, 1], dtype=np.uint8),
        behavior_logprobs=np.zeros(6, dtype=np.float32),
        spans=(VersionSpan(2, WeightId(1, 4)), VersionSpan(4, WeightId(1, 5))),
        reward=0.5,
        finish_reason="stop",
    )
    assert TrajectoryMeta.of(trajectory, 99) == TrajectoryMeta(TrajectoryKey(3, 1), 2, 6, 3, 99, ((4, 2), (5, 1)), 0.5)


@pytest.mark.parametrize("module", ["slime_async.queue.queue", "slime_async.queue.tasks"])
def test_the_examples_of_the_docstrings_hold(module: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert failed == 0
    assert attempted > 0


def test_statistics_are_flat_numbers() -> None:
    drive = Driver(make_limits())
    drive.deliver_all(drive.grant())
    drive.train(0)
    report = drive.queue.statistics(drive.now).as_report()
    assert all(isinstance(value, int | float) for value in report.values())
    assert report["accepted"] == 8


@pytest.mark.parametrize("slots", [0, -3])
def test_an_actor_without_free_slots_gets_nothing(slots: int) -> None:
    drive = Driver(make_limits())
    assert drive.grant(slots) == ()
