"""The bound at consumption, and staleness as it is measured."""

from __future__ import annotations

import numpy as np
import pytest
from queue_driver import Driver, make_limits, tasks_of

from slime_async.queue import Waiting, stale_token_mask
from slime_async.queue.limits import OnStale
from slime_async.queue.staleness import two_sample_distance


def stale_driver(on_stale: OnStale) -> Driver:
    """η = 1, at version 3: tasks 10, 11, 12 are complete, generated with (0), (0 then 3) and (3)."""
    drive = Driver(make_limits(group_size=2, groups=2, eta=1, on_stale=on_stale))
    for version in range(3):
        drive.deliver_all(drive.grant(4), version)
        drive.train(version)
    granted = drive.grant(6)
    for reservation, spans in zip(granted[:2], (((0, 5), (1, 5)), ((1, 10),)), strict=True):
        drive.deliver(reservation, spans=spans)
    for reservation, spans in zip(granted[2:4], (((0, 4), (3, 6)), ((3, 10),)), strict=True):
        drive.deliver(reservation, spans=spans)
    for reservation in granted[4:]:
        drive.deliver(reservation, 3)
    return drive


@pytest.mark.parametrize(
    ("on_stale", "tasks", "min_version", "dropped_groups"),
    [
        ("mask", [7, 8], 2, 1),  # of task 6 no token would remain; task 7 keeps its newer ones
        ("wait", [6, 7], 2, 0),
        ("train", [6, 7], None, 0),
    ],
)
def test_the_bound_at_the_lease(
    on_stale: OnStale, tasks: list[int], min_version: int | None, dropped_groups: int
) -> None:
    drive = stale_driver(on_stale)
    batch = drive.lease(3)
    assert (tasks_of(batch), batch.min_version) == (tasks, min_version)
    assert drive.queue.statistics(0.0).dropped_stale_groups == dropped_groups


def test_drop_takes_whole_groups_and_their_capacity_is_granted_again() -> None:
    drive = stale_driver("drop")
    assert len(drive.grant()) == 2
    answer = drive.ask(3)
    assert isinstance(answer, Waiting)
    assert answer.reason.startswith("1 of 2 groups complete")
    assert drive.queue.statistics(0.0).dropped_stale_groups == 2
    assert len(drive.queue.take_released()) == 4
    again = drive.grant()
    assert [r.task.serial for r in again] == [10, 10, 11, 11]
    drive.deliver_all(again[:2], 3)
    assert tasks_of(drive.lease(3)) == [8, 10]


def test_wait_leaves_in_strict_order_of_grants() -> None:
    drive = Driver(make_limits(eta=2, on_stale="wait"))
    granted = drive.grant()
    drive.deliver_all(granted[1:])
    answer = drive.ask(0)
    assert isinstance(answer, Waiting)
    assert "the group of task 0 leaves first and lacks 1 samples" in answer.reason
    drive.deliver_all(granted[:1])
    assert tasks_of(drive.lease(0)) == [0, 1]
    assert tasks_of(drive.lease(1)) == [2, 3]


def test_a_batch_leased_ahead_is_bounded_by_the_version_that_will_train_it() -> None:
    drive = Driver(make_limits(eta=1))
    drive.deliver_all(drive.grant())
    drive.lease(0)
    assert drive.lease(1).min_version == 0


def test_fully_masked_trajectories_are_counted_and_stay_in_their_group() -> None:
    drive = Driver(make_limits(eta=0, group_size=2, groups=1))
    drive.deliver_all(drive.grant(), 0)
    drive.train(0)
    old, new = drive.grant()
    drive.deliver(old, 0)
    drive.deliver(new, 1)
    batch = drive.lease(1)
    assert batch.keys == (old.key, new.key)
    statistics = drive.queue.statistics(0.0)
    assert (statistics.masked_trajectories, statistics.masked_tokens, statistics.dropped) == (1, 10, 0)
    assert batch.staleness.stale_trajectories == 1


def test_stale_tokens_that_train_are_counted() -> None:
    drive = stale_driver("train")
    drive.lease(3)
    statistics = drive.queue.statistics(0.0)
    assert (statistics.trained_stale_tokens, statistics.masked_tokens) == (24, 0)


def test_staleness_in_generation_and_in_queue_add_up() -> None:
    drive = Driver(make_limits(group_size=1, groups=1, eta=2))
    first, second, third = drive.grant()
    drive.deliver(first, 0)
    drive.train(0)
    drive.deliver(second, spans=((0, 30), (1, 10)))  # delivered while 1 is published
    drive.deliver(third, spans=((0, 10),))
    drive.train(1)
    staleness = drive.lease(2).staleness
    assert staleness.histogram == ((2, 10),)
    assert (staleness.in_generation, staleness.in_queue, staleness.mean) == (1.0, 1.0, 2.0)
    assert (staleness.newest, staleness.oldest) == (2, 2)


def test_the_mean_is_weighted_by_tokens() -> None:
    drive = Driver(make_limits(group_size=1, groups=1, eta=2))
    (first, second, _) = drive.grant()
    drive.deliver(first, 0)
    drive.train(0)
    drive.deliver(second, spans=((0, 30), (1, 10)))
    staleness = drive.lease(1).staleness
    assert staleness.histogram == ((0, 10), (1, 30))
    assert staleness.mean == 0.75


def test_tokens_newer_than_the_publication_are_delivered_at_their_own_version() -> None:
    drive = Driver(make_limits(group_size=1, groups=1, eta=2))
    first, second, _ = drive.grant()
    drive.deliver(first, 0)
    drive.lease(0)
    drive.commit(0)
    drive.deliver(second, 1)  # this engine has version 1 already, others don't
    staleness = drive.lease(1).staleness
    assert (staleness.in_generation, staleness.in_queue) == (0.0, 0.0)


def test_the_mask_keeps_fresh_sampled_tokens() -> None:
    versions = np.array([-1, -1, 3, 4, 5, -1, 6])
    mask = stale_token_mask(versions, train_version=6, max_staleness=1)
    assert mask.dtype == np.float32
    assert mask.tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert stale_token_mask(versions, 0, 10).tolist() == [0, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [([1, 2, 3], [1, 2, 3], 0.0), ([1, 2], [3, 4], 1.0), ([1, 1, 2, 2], [1, 2, 2, 2], 0.25), ([], [1], 0.0)],
)
def test_two_sample_distance(first: list[int], second: list[int], wanted: float) -> None:
    assert two_sample_distance(first, second) == pytest.approx(wanted)


def test_dropping_by_age_shows_in_the_lengths() -> None:
    drive = Driver(make_limits(group_size=1, groups=1, eta=2, on_stale="drop"))
    for version in range(20):
        for reservation in drive.grant():
            long = reservation.task.serial % 2
            stale = long and version > 2
            drive.deliver(reservation, spans=((version - 3 if stale else version, 100 if long else 10),))
        drive.train(version)
    statistics = drive.queue.statistics(0.0)
    assert statistics.length_trained_mean < statistics.length_generated_mean
    assert 0.1 < statistics.length_distance <= 1
