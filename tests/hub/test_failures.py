"""Failures are counted by reason, and end a run in which nothing else happens."""

from __future__ import annotations

import pytest

from slime_async.config import ConfigError
from slime_async.transport.failures import FAILING_FOR_S, MAX_IN_A_ROW, Failures
from tests.hub.players import make_config, run, stage


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fail_often(failures: Failures, count: int = MAX_IN_A_ROW) -> None:
    for _ in range(count):
        failures.episode_failed("ZeroDivisionError", "ZeroDivisionError: a reward that raises", counts=True)


def test_a_run_in_which_every_episode_fails_is_hopeless_after_a_while() -> None:
    clock = Clock()
    failures = Failures(clock)
    fail_often(failures, 10 * MAX_IN_A_ROW)
    assert failures.hopeless == "", "an engine that died may come back"
    clock.now = FAILING_FOR_S
    assert "640 episodes in a row have failed within 30 s" in failures.hopeless
    assert "a reward that raises" in failures.hopeless


def test_one_that_succeeds_gives_hope_again() -> None:
    clock = Clock()
    failures = Failures(clock)
    fail_often(failures)
    clock.now = FAILING_FOR_S
    failures.episode_succeeded()
    fail_often(failures)
    assert failures.hopeless == ""
    clock.now += FAILING_FOR_S
    assert failures.hopeless


def test_evaluations_are_no_failures_of_a_batch_but_count_for_hope() -> None:
    failures = Failures(Clock())
    failures.episode_failed("TimeoutError", "late", counts=True)
    failures.episode_failed("TimeoutError", "late", counts=False)
    failures.group_failed(4, "judge")
    assert failures.take() == {"TimeoutError": 1, "judge": 4}
    assert failures.take() == {}


def test_a_hopeless_run_ends_with_the_last_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime_async.transport.failures.FAILING_FOR_S", 0.0)
    monkeypatch.setattr("slime_async.transport.failures.MAX_IN_A_ROW", 4)

    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await hub.actor(), await hub.learner()
            await learner.publish(0)
            granted = await actor.granted(8)
            for reservation in granted[:4]:
                await actor.fail(reservation, "KeyError: 'answer'", "KeyError")
            await actor.leaves()
            await learner.leaves()
            with pytest.raises(ConfigError, match=r"4 episodes in a row .* KeyError: 'answer'"):
                await hub.running

    run(test())
