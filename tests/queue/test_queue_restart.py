"""Nothing lost, nothing twice: learners that restart, and hubs that replay their journal."""

from __future__ import annotations

import json

import pytest
from queue_driver import LEARNER, Driver, keys_of, make_limits, tasks_of

from slime_async.queue import Event, QueueLimits, TaskStream, TrajectoryQueue, from_plain, to_plain
from slime_async.queue.limits import OnStale


def trained_driver(batches: int, on_stale: OnStale = "mask", **arguments: int) -> Driver:
    drive = Driver(make_limits(eta=1, on_stale=on_stale, **arguments))
    for version in range(batches):
        drive.deliver_all(drive.grant(), version)
        drive.train(version)
    return drive


def replayed(limits: QueueLimits, journal: list[Event]) -> TrajectoryQueue:
    return TrajectoryQueue.replay(limits, TaskStream({"train": 1.0}, shuffle=False), journal)


@pytest.mark.parametrize("on_stale", ["mask", "drop", "wait", "train"])
def test_a_learner_that_restarts_trains_the_same_batches_again(on_stale: OnStale) -> None:
    drive = Driver(make_limits(eta=1, on_stale=on_stale))
    first = []
    for version in range(5):
        drive.deliver_all(drive.grant(), version)
        first.append(drive.train(version))
        if version == 1:
            drive.queue.make_durable(LEARNER, 2)
    drive.queue.learner_joined(LEARNER + 1, 2, drive.tick())
    assert drive.queue.trained_version == 2
    for version in (2, 3, 4):
        again = drive.train(version, LEARNER + 1)
        assert (again.keys, again.staleness, again.min_version) == (
            first[version].keys,
            first[version].staleness,
            first[version].min_version,
        )
        assert again.retrained
        assert not first[version].retrained
    drive.deliver_all(drive.grant(), 5)
    assert not drive.lease(5, LEARNER + 1).retrained


def test_batches_to_retrain_close_admission_until_they_are_published_again() -> None:
    drive = trained_driver(4)
    assert len(drive.grant()) == 4
    drive.queue.learner_joined(LEARNER + 1, 0, drive.tick())
    statistics = drive.queue.statistics(0.0)
    assert (statistics.to_retrain, statistics.pacing, statistics.published_version) == (16, 24, 0)
    assert drive.grant() == ()
    assert "has not leased batch 0, which was trained before" in drive.queue.waiting_for(0.0)
    for version in range(4):
        drive.train(version, LEARNER + 1)
    assert drive.queue.statistics(0.0).pacing == 8


def test_a_lease_ends_with_its_learner_and_returns_to_its_place() -> None:
    drive = Driver(make_limits(eta=2))
    drive.deliver_all(drive.grant())
    first, ahead = drive.lease(0), drive.lease(1)
    drive.queue.learner_joined(LEARNER + 1, 0, drive.tick())
    assert drive.queue.statistics(0.0).complete_groups == 6
    assert drive.lease(0, LEARNER + 1).keys == first.keys
    assert drive.lease(1, LEARNER + 1).keys == ahead.keys
    for call in (drive.lease, drive.commit, drive.publish):
        with pytest.raises(ValueError, match="incarnation 1 is not the present one, 2"):
            call(0)
    with pytest.raises(ValueError, match="incarnation 1 was replaced by 2"):
        drive.queue.learner_joined(LEARNER, 0, drive.tick())


def test_the_same_incarnation_joining_again_keeps_its_lease() -> None:
    drive = Driver(make_limits())
    drive.deliver_all(drive.grant())
    batch = drive.lease(0)
    drive.queue.learner_joined(LEARNER, 0, drive.tick())
    assert drive.lease(0) == batch


def test_a_checkpoint_proves_that_the_batch_before_it_was_trained() -> None:
    drive = Driver(make_limits())
    drive.deliver_all(drive.grant())
    drive.lease(0)
    drive.queue.learner_joined(LEARNER + 1, 1, drive.tick())
    assert drive.queue.trained_version == 1
    assert not drive.lease(1, LEARNER + 1).retrained


def test_a_version_that_cannot_be_carried_on_from_is_refused() -> None:
    drive = trained_driver(3)
    drive.queue.make_durable(LEARNER, 2)
    with pytest.raises(ValueError, match="restarts from version 1, but batches below 2 were released"):
        drive.queue.learner_joined(LEARNER + 1, 1, drive.tick())
    with pytest.raises(ValueError, match="version 5 is ahead of the 3 batches trained and 0 leased"):
        drive.queue.learner_joined(LEARNER + 1, 5, drive.tick())


def test_a_new_run_may_start_from_any_version() -> None:
    queue = TrajectoryQueue(make_limits(eta=0), TaskStream({"train": 1.0}))
    queue.declare_sources({"train": 100})
    queue.learner_joined(1, 40, 0.0)
    queue.publish(1, 40, 0.0)
    assert len(queue.grant("a", 100, 0.0)) == 4
    assert (queue.trained_version, queue.published_version) == (40, 40)


def test_a_replay_has_the_same_state_and_grants_what_was_in_flight() -> None:
    drive = trained_driver(3)
    drive.queue.evaluate("v3", "held-out", 2, drive.tick())
    in_flight = drive.grant(6)
    drive.deliver(in_flight[4], 3)
    journal = list(drive.queue.take_events())
    queue = replayed(drive.queue.limits, journal)
    assert queue.state() == drive.queue.state()
    assert queue.take_events() == ()
    again = queue.grant("b", 6, 0.0)
    missing = [key for key in keys_of(in_flight) if key != in_flight[4].key]
    assert keys_of(again)[: len(missing)] == missing


def test_a_finished_evaluation_survives_a_replay_and_an_unfinished_one_begins_anew() -> None:
    drive = trained_driver(1)
    drive.queue.evaluate("done", "held-out", 2, drive.tick())
    drive.deliver_all(drive.grant(2))
    drive.queue.evaluate("open", "held-out", 2, drive.tick())
    drive.deliver_all(drive.grant(1))
    queue = replayed(drive.queue.limits, list(drive.queue.take_events()))
    assert queue.evaluation_result("done") == drive.queue.evaluation_result("done")
    assert queue.evaluation_result("open") is None
    assert [r.evaluation for r in queue.grant("a", 3, 0.0)] == ["open", "open", ""]


def test_a_lease_survives_a_replay() -> None:
    drive = trained_driver(2)
    drive.deliver_all(drive.grant(), 2)
    batch = drive.lease(2)
    queue = replayed(drive.queue.limits, list(drive.queue.take_events()))
    queue.learner_joined(LEARNER, 2, 0.0)
    assert queue.lease(LEARNER, 2, 0.0) == batch
    queue.commit(LEARNER, 2, 0.0)
    queue.commit(LEARNER, 2, 0.0)
    assert queue.trained_version == 3


def test_a_journal_may_begin_with_a_snapshot() -> None:
    drive = trained_driver(2)
    journal: list[Event] = list(drive.queue.take_events())
    compacted: list[Event] = [drive.queue.state()]
    drive.deliver_all(drive.grant(), 2)
    drive.train(2)
    drive.queue.make_durable(LEARNER, 1)
    later = drive.queue.take_events()
    states = [replayed(drive.queue.limits, [*start, *later]).state() for start in (journal, compacted)]
    assert states == [drive.queue.state()] * 2


def test_events_survive_json() -> None:
    drive = trained_driver(2, max_attempts=1)
    drive.queue.evaluate("v2", "held-out", 2, drive.tick())
    first, second, *_, last = drive.grant(5)
    drive.deliver_all((first, second))
    drive.fail(last)
    drive.queue.make_durable(LEARNER, 1)
    drive.queue.learner_joined(LEARNER + 1, 1, drive.tick())
    journal = [*drive.queue.take_events(), drive.queue.state()]
    assert len({type(event) for event in journal}) == 13
    read = [from_plain(json.loads(json.dumps(to_plain(event)))) for event in journal]
    assert read == journal
    assert [type(event) for event in read] == [type(event) for event in journal]
    with pytest.raises(ValueError, match="unknown event 'Nonsense'"):
        from_plain(["@", "Nonsense"])


def test_a_journal_of_another_batch_shape_is_refused() -> None:
    drive = trained_driver(1)
    other = make_limits(group_size=4, eta=1)
    for journal in (list(drive.queue.take_events()), [drive.queue.state()]):
        with pytest.raises(ValueError, match="the journal has 2 groups of 2 per batch, the configuration 2 of 4"):
            replayed(other, journal)


def test_payloads_are_released_once_and_only_when_nobody_needs_them() -> None:
    drive = trained_driver(2)
    assert len(drive.queue.payload_keys()) == 12
    drive.queue.make_durable(LEARNER, 2)
    released = drive.queue.take_released()
    assert (len(released), drive.queue.take_released()) == (8, ())
    drive.queue.make_durable(LEARNER, 2)
    assert drive.queue.take_released() == ()
    assert set(drive.queue.payload_keys()).isdisjoint(released)


def test_groups_dropped_as_stale_stay_dropped_after_a_rollback() -> None:
    drive = Driver(make_limits(group_size=1, groups=1, eta=1, on_stale="drop"))
    drive.deliver_all(drive.grant(), 0)
    drive.train(0)
    drive.train(1)
    for reservation in drive.grant():
        drive.deliver(reservation, 0 if reservation.task.serial == 2 else 2)
    assert tasks_of(drive.lease(2)) == [3]
    drive.queue.learner_joined(LEARNER + 1, 1, drive.tick())
    assert tasks_of(drive.train(1, LEARNER + 1)) == [1]
    assert tasks_of(drive.train(2, LEARNER + 1)) == [3]


def test_nothing_is_granted_before_a_new_learner_publishes_what_it_starts_from() -> None:
    drive = trained_driver(1)
    drive.queue.learner_joined(LEARNER + 1, 1, drive.tick())
    assert drive.grant() == ()
    assert "until learner incarnation 2 publishes its weights" in drive.queue.waiting_for(0.0)
    again = replayed(drive.queue.limits, [*drive.queue.take_events()])
    assert again.grant("actor-0", 8, 1.0) == ()
    drive.queue.publish(LEARNER + 1, 1, drive.tick())
    assert drive.grant()


def test_an_actor_that_comes_back_keeps_what_it_works_on() -> None:
    drive = Driver(make_limits(eta=1))
    held = drive.queue.grant("actor-0", 5, drive.tick())
    queue = replayed(drive.queue.limits, list(drive.queue.take_events()))
    queue.adopt("actor-0", held, 1.0)
    assert queue.outstanding("actor-0") == 5
    others = queue.grant("actor-1", 8, 2.0)
    assert {r.key for r in others}.isdisjoint(r.key for r in held)
    assert len(others) == 3


def test_work_that_others_have_done_meanwhile_only_takes_its_actors_slot() -> None:
    drive = Driver(make_limits(eta=1))
    held = drive.queue.grant("actor-0", 2, drive.tick())
    drive.queue.lose_actor("actor-0", drive.tick())
    for reservation in drive.queue.grant("actor-1", 8, drive.tick()):
        drive.deliver(reservation, actor="actor-1")
    before = drive.queue.statistics(0.0).pacing
    drive.queue.adopt("actor-0", held, drive.tick())
    assert drive.queue.statistics(0.0).pacing == before
    assert drive.queue.outstanding("actor-0") == 2
    assert [drive.deliver(reservation, actor="actor-0") for reservation in held] == ["duplicate", "duplicate"]
    assert drive.queue.outstanding("actor-0") == 0
