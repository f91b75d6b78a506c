"""Pacing, backpressure and the configurations that would deadlock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from queue_driver import Driver, keys_of, make_limits

from slime_async.config.schema import BatchConfig, Config, StalenessConfig
from slime_async.queue import QueueLimits, TaskStream
from slime_async.queue.admission import capacity

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "areal_staleness_capacity.json"
TRACES = json.loads(REFERENCE.read_text())["cases"]


@pytest.mark.parametrize("case", TRACES, ids=lambda c: f"B{c['consumer_batch_size']}-eta{c['max_staleness']}")
def test_capacity_equals_areal_on_every_step_of_its_traces(case: dict[str, Any]) -> None:
    version = accepted = running = 0
    for event, wanted in case["trace_event_then_capacity"]:
        running += {"submit": 1, "accept": -1, "reject": -1}.get(event, 0)
        accepted += event == "accept"
        version += event == "version+1"
        got = capacity(
            version=version,
            batch=case["consumer_batch_size"],
            max_staleness=case["max_staleness"],
            accepted=accepted,
            running=running,
            max_concurrent=case["max_concurrent_rollouts"],
        )
        assert got == wanted


@pytest.mark.parametrize("eta", [0, 1, 3])
def test_the_queue_grants_what_the_formula_allows(eta: int) -> None:
    drive = Driver(make_limits(eta=eta))
    for version in range(3):
        drive.deliver_all(drive.grant(), version)
        statistics = drive.queue.statistics(0.0)
        accepted = version * drive.queue.limits.batch + statistics.queued
        assert capacity(version=version, batch=4, max_staleness=eta, accepted=accepted, running=0) == 0
        drive.train(version)


def test_a_full_queue_in_trajectories_stops_grants_and_drops_nothing() -> None:
    drive = Driver(make_limits(eta=3, trajectories=6))
    drive.deliver_all(drive.grant())
    statistics = drive.queue.statistics(0.0)
    assert (statistics.queued, statistics.held, statistics.dropped) == (6, 6, 0)
    assert "queue_trajectories: 6 of 6 held" in drive.queue.waiting_for(0.0)
    drive.lease(0)
    assert drive.grant() == ()
    drive.commit(0)
    assert len(drive.grant()) == 4


def test_a_full_queue_in_bytes_stops_grants_and_drops_nothing() -> None:
    drive = Driver(make_limits(eta=9, queue_bytes=4000, trajectory_bytes=1000))
    first = drive.grant()
    assert len(first) == 4  # nothing is known of sizes: each may take 1000
    for reservation in first:
        drive.deliver(reservation, size_bytes=500)
    while granted := drive.grant():  # of size 100, expected at 500
        drive.deliver_all(granted)
    statistics = drive.queue.statistics(0.0)
    assert (statistics.held_bytes, statistics.dropped) == (3200, 0)
    assert "queue_bytes: 3200 of 4000 held" in drive.queue.waiting_for(0.0)
    drive.lease(0)
    assert drive.grant() == ()
    drive.commit(0)
    assert len(drive.grant()) == 4


def test_bytes_are_exceeded_only_by_samples_that_were_already_admitted() -> None:
    drive = Driver(make_limits(eta=20, queue_bytes=4000, trajectory_bytes=1000))
    (small, *others) = drive.grant()
    drive.deliver(small, size_bytes=100)
    others += drive.grant()
    for reservation in others:
        drive.deliver(reservation, size_bytes=1000)
    assert drive.queue.statistics(0.0).held_bytes <= 4000 + len(others) * 900
    assert drive.grant() == ()
    assert "queue_bytes" in drive.queue.waiting_for(0.0)


def test_batches_of_the_largest_trajectories_always_fit() -> None:
    drive = Driver(make_limits(eta=2, queue_bytes=4000, trajectory_bytes=1000))
    for version in range(5):
        for reservation in drive.grant():
            drive.deliver(reservation, version, size_bytes=1000)
        assert drive.queue.statistics(0.0).held_bytes <= 4000
        drive.train(version)


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ({"trajectories": 3}, "queue_trajectories = 3 is less than one batch of 4"),
        ({"queue_bytes": 100, "trajectory_bytes": 101}, "max_trajectory_bytes = 101 exceeds queue_bytes = 100"),
        ({"queue_bytes": 399, "trajectory_bytes": 100}, "at least 400 or max_trajectory_bytes to at most 99"),
        ({"eta": -1, "trajectories": 9}, "max_staleness = -1"),
        ({"groups": 0, "trajectories": 9}, "groups_per_batch = 0"),
        ({"max_attempts": 0}, "max_attempts = 0"),
        ({"group_size": 1, "drop_equal_rewards": True}, "drop_equal_rewards with group_size = 1"),
    ],
)
def test_configurations_that_would_deadlock_are_refused(arguments: dict[str, Any], numbers: str) -> None:
    with pytest.raises(ValueError, match=numbers):
        make_limits(**arguments)


def test_limits_come_from_the_configuration() -> None:
    limits = QueueLimits.from_config(Config())
    assert (limits.batch, limits.pacing, limits.queue_trajectories) == (256, 768, 768)
    assert limits.queue_bytes == 256 * limits.max_trajectory_bytes
    config = Config(
        batch=BatchConfig(group_size=2, groups=3, queue_trajectories=7, queue_bytes=99, max_trajectory_bytes=9),
        staleness=StalenessConfig(max_staleness=4, on_stale="wait"),
    )
    assert QueueLimits.from_config(config) == QueueLimits(2, 3, 4, "wait", 7, 99, 9)


def test_admission_names_what_is_missing_when_there_are_no_tasks() -> None:
    drive = Driver(make_limits(), tasks=TaskStream({"train": 1.0}, epochs=1), sources={"train": 1})
    assert len(drive.grant()) == 2
    assert drive.queue.waiting_for(0.0).count("no tasks are left") == 1


def test_open_groups_never_wait_for_each_others_room() -> None:
    drive = Driver(make_limits(group_size=3, groups=2, eta=1, trajectories=7))
    first = drive.grant(4)
    for reservation in first:
        drive.fail(reservation)
    drive.deliver_all(drive.grant())
    assert keys_of(drive.grant()) == []
    assert len(drive.lease(0).keys) == 6
