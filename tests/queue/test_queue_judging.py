"""Groups that are judged as a whole: leased once they are, replaced when they are refused."""

from __future__ import annotations

import functools

import pytest

from slime_async.queue import LeasedBatch, TaskStream, TrajectoryQueue, Waiting
from slime_async.queue.events import from_plain, to_plain
from tests.queue.queue_driver import LEARNER, Driver, make_limits

judged_limits = functools.partial(make_limits, eta=0, judge_groups=True)


def complete_batch(driver: Driver) -> tuple[int, ...]:
    """Two groups with all their samples; their serials."""
    reservations = driver.grant()
    driver.deliver_all(reservations)
    return tuple(sorted({reservation.key.task for reservation in reservations}))


def test_a_complete_group_waits_for_its_judge_and_is_leased_with_its_rewards() -> None:
    driver = Driver(judged_limits())
    first, second = complete_batch(driver)
    assert driver.queue.groups_to_judge() == (first, second)
    driver.queue.judge(second, [0.0, 1.0], keep=True, now=driver.tick())
    waiting = driver.queue.lease(LEARNER, 0, driver.tick())
    assert isinstance(waiting, Waiting)
    assert waiting.reason.startswith("1 of 2 groups complete")
    assert "1 groups wait for their judge" in waiting.reason

    driver.queue.judge(first, [0.5, -0.5], keep=True, now=driver.tick())
    assert driver.queue.groups_to_judge() == ()
    batch = driver.queue.lease(LEARNER, 0, driver.tick())
    assert isinstance(batch, LeasedBatch)
    assert [key.task for key in batch.keys] == [first, first, second, second]
    assert batch.rewards == (0.5, -0.5, 0.0, 1.0)


def test_a_refused_group_is_replaced_and_what_it_cost_is_counted() -> None:
    driver = Driver(judged_limits())
    first, second = complete_batch(driver)
    driver.queue.judge(first, [1.0, 1.0], keep=False, now=driver.tick())
    driver.queue.judge(second, [1.0, 1.0], keep=True, now=driver.tick())
    statistics = driver.queue.statistics(driver.now)
    assert (statistics.filtered_groups, statistics.filtered_tokens) == (1, 20)
    assert (statistics.dropped_filtered_groups, statistics.complete_groups) == (1, 1)
    assert {reservation.key.task for reservation in driver.grant()} == {second + 1}


def test_equal_rewards_are_looked_at_once_the_judge_has_spoken() -> None:
    driver = Driver(judged_limits(drop_equal_rewards=True))
    first, second = complete_batch(driver)
    assert driver.queue.groups_to_judge() == (first, second), "equal before, but the judge may see a difference"
    driver.queue.judge(first, [0.0, 1.0], keep=True, now=driver.tick())
    driver.queue.judge(second, [1.0, 1.0], keep=True, now=driver.tick())
    statistics = driver.queue.statistics(driver.now)
    assert (statistics.complete_groups, statistics.dropped_equal_rewards_groups) == (1, 1)
    assert statistics.filtered_groups == 1


def test_a_group_whose_judge_failed_is_dropped_as_failed() -> None:
    driver = Driver(judged_limits())
    first, _ = complete_batch(driver)
    driver.queue.give_up_group(first, "judge: out of ideas", driver.tick())
    driver.queue.give_up_group(first, "told again", driver.tick())
    statistics = driver.queue.statistics(driver.now)
    assert (statistics.dropped_failed_groups, statistics.failures) == (1, 1)
    assert "judge: out of ideas" in driver.queue.waiting_for(driver.now)


@pytest.mark.parametrize("rewards", [[1.0], [1.0, float("nan")]])
def test_a_judge_that_gives_no_number_per_sample_is_refused(rewards: list[float]) -> None:
    driver = Driver(judged_limits())
    first, _ = complete_batch(driver)
    with pytest.raises(ValueError, match="must be 2 finite numbers"):
        driver.queue.judge(first, rewards, keep=True, now=driver.tick())


@pytest.mark.parametrize("compacted", [False, True])
def test_a_restarted_hub_judges_what_was_not_judged_and_remembers_the_rest(compacted: bool) -> None:
    driver = Driver(judged_limits())
    first, second = complete_batch(driver)
    driver.queue.judge(first, [0.25, 0.75], keep=True, now=driver.tick())
    journal = (driver.queue.state(),) if compacted else driver.queue.take_events()
    again = TrajectoryQueue.replay(
        judged_limits(), TaskStream({"train": 1.0}, shuffle=False), (from_plain(to_plain(event)) for event in journal)
    )
    assert again.groups_to_judge() == (second,)
    again.judge(second, [0.0, 1.0], keep=True, now=100.0)
    batch = again.lease(LEARNER, 0, 101.0)
    assert isinstance(batch, LeasedBatch)
    assert batch.rewards == (0.25, 0.75, 0.0, 1.0)


def test_without_a_judge_nothing_waits_and_no_rewards_are_replaced() -> None:
    driver = Driver(make_limits(eta=0))
    complete_batch(driver)
    assert driver.queue.groups_to_judge() == ()
    batch = driver.queue.lease(LEARNER, 0, driver.tick())
    assert isinstance(batch, LeasedBatch)
    assert batch.rewards == ()
