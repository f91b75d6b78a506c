"""Evaluations run beside training and never enter its counts."""

from __future__ import annotations

import pytest
from queue_driver import LEARNER, Driver, make_limits

from slime_async.protocol import EvaluationResult


def test_evaluation_is_granted_first_and_kept_apart() -> None:
    drive = Driver(make_limits())
    drive.queue.evaluate("v0", "held-out", 3, drive.tick())
    granted = drive.grant(5)
    assert [r.evaluation for r in granted] == ["v0", "v0", "v0", "", ""]
    assert [(r.task.source, r.task.index, r.task.serial) for r in granted[:3]] == [
        ("held-out", 0, -1),
        ("held-out", 1, -2),
        ("held-out", 2, -3),
    ]
    statistics = drive.queue.statistics(0.0)
    assert (statistics.pacing, statistics.evaluation_reserved) == (2, 3)
    assert drive.queue.evaluation_result("v0") is None
    for reward, reservation in enumerate(reversed(granted[:3])):
        assert drive.deliver(reservation, reservation.task.index, reward=float(reward)) == "accepted"
    assert drive.queue.evaluation_result("v0") == EvaluationResult("v0", (2.0, 1.0, 0.0), 0, (0, 1, 2))
    assert drive.queue.statistics(0.0).accepted == 0
    assert drive.deliver(granted[0]) == "duplicate"


def test_evaluation_does_not_wait_for_training_and_training_does_not_wait_for_it() -> None:
    drive = Driver(make_limits())
    drive.deliver_all(drive.grant())
    drive.queue.evaluate("v0", "held-out", 2, drive.tick())
    stuck = drive.grant()
    assert len(stuck) == 2
    drive.train(0)
    assert len(drive.grant()) == 4
    assert "evaluation 'v0' lacks 2 results" in drive.queue.waiting_for(0.0)


def test_a_dead_actor_returns_its_evaluation_tasks() -> None:
    drive = Driver(make_limits())
    drive.queue.evaluate("v0", "held-out", 2, drive.tick())
    first = drive.grant(2, "dead")
    assert set(drive.queue.lose_actor("dead", drive.tick())) == {r.key for r in first}
    again = drive.grant(2, "alive")
    assert [(r.key, r.attempt) for r in again] == [(r.key, 1) for r in first]


def test_a_task_that_keeps_failing_is_counted_as_failed() -> None:
    drive = Driver(make_limits(max_attempts=2))
    drive.queue.evaluate("v0", "held-out", 2, drive.tick())
    for _ in range(2):
        (bad,) = drive.grant(1)
        drive.fail(bad)
    (good,) = drive.grant(1)
    drive.deliver(good, reward=0.5)
    assert drive.queue.evaluation_result("v0") == EvaluationResult("v0", (0.5,), 1, (0,))
    assert drive.deliver(bad) == "unwanted"


def test_opening_an_evaluation_again_changes_nothing() -> None:
    drive = Driver(make_limits())
    drive.queue.evaluate("v0", "held-out", 512, drive.tick())
    drive.queue.evaluate("v0", "held-out", 3, drive.tick())
    assert drive.queue.statistics(0.0).evaluation_missing == 3
    with pytest.raises(ValueError, match="evaluation 'v0' is 3 tasks of 'held-out', not 2 of 'held-out'"):
        drive.queue.evaluate("v0", "held-out", 2, drive.tick())
    with pytest.raises(ValueError, match="'nowhere': the actors' sources are"):
        drive.queue.evaluate("v1", "nowhere", 2, drive.tick())
    with pytest.raises(ValueError, match="no evaluation 'v9'"):
        drive.queue.evaluation_result("v9")


def test_a_new_learner_starts_its_evaluations_anew() -> None:
    drive = Driver(make_limits())
    drive.queue.evaluate("v0", "held-out", 1, drive.tick())
    (old,) = drive.grant(1)
    drive.queue.learner_joined(LEARNER + 1, 0, drive.tick())
    drive.queue.publish(LEARNER + 1, 0, drive.tick())
    assert drive.deliver(old) == "unwanted"
    drive.queue.evaluate("v0", "held-out", 1, drive.tick())
    (new,) = drive.grant(1)
    assert new.key != old.key
    assert drive.queue.outstanding("a") == 1


def test_an_evaluation_takes_no_more_than_its_share_of_an_actors_slots() -> None:
    drive = Driver(make_limits())
    drive.queue.evaluate("v4", "held-out", 3, drive.tick(), samples=4, share=0.25)
    granted = drive.queue.grant("a", 8, drive.tick(), 8)
    assert [r.evaluation for r in granted] == ["v4", "v4", *[""] * 6]
    assert drive.queue.grant("a", 1, drive.tick(), 8)[0].evaluation == "", "training goes on"
    drive.deliver(granted[0])
    assert [r.evaluation for r in drive.queue.grant("a", 2, drive.tick(), 8)] == ["v4", ""]
    assert len(drive.queue.grant("tiny", 3, drive.tick(), 3)) >= 1
    drive.queue.evaluate("after", "held-out", 3, drive.tick())
    assert sum(r.evaluation != "" for r in drive.queue.grant("b", 9, drive.tick(), 9)) == 9, "a whole share is whole"


def test_several_answers_per_task_come_back_by_task() -> None:
    drive = Driver(make_limits(max_attempts=1))
    drive.queue.evaluate("v4", "held-out", 2, drive.tick(), samples=2)
    granted = drive.grant(4)
    assert [(r.task.index, r.sample) for r in granted] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for reservation, reward in zip(reversed(granted[1:]), (0.25, 0.5, 0.75), strict=True):
        assert drive.deliver(reservation, reward=reward) == "accepted"
    drive.fail(granted[0])
    assert drive.queue.evaluation_result("v4") == EvaluationResult("v4", (0.75, 0.5, 0.25), 1, (0,), (1, 2))
    with pytest.raises(ValueError, match="at least one sample"):
        drive.queue.evaluate("v5", "held-out", 2, drive.tick(), samples=0)
