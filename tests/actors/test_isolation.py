"""User code in processes of its own: results come back, and nothing that it does reaches the actor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slime_async.actors import single_turn
from slime_async.actors.isolation import WorkerError, WorkerPool
from slime_async.actors.isolation.pool import import_path
from slime_async.actors.plugins import load_generate, load_reward
from slime_async.actors.rollout import Rollout, RolloutFailure, RolloutSettings
from slime_async.config import ConfigError
from slime_async.config.schema import TaskConfig
from slime_async.protocol import Reservation
from slime_async.trajectory import TaskRef
from tests.actors import workhorse
from tests.actors.scripted import SAMPLING, TOKENIZER, ScriptedEngine, says

DEADLINE_S = 100.0


def with_pool(work: Callable[[WorkerPool], Awaitable[Any]], size: int = 1, **limits: Any) -> Any:
    async def run() -> Any:
        pool = WorkerPool(size, **{"timeout_s": DEADLINE_S, **limits})
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await work(pool)
        finally:
            await pool.close()
            assert pool.processes == 0

    return asyncio.run(run())


def test_calls_give_plain_data_and_name_what_went_wrong() -> None:
    async def work(pool: WorkerPool) -> None:
        assert pool.processes == 0, "none is started before it is used"
        assert await pool.call(workhorse.add, 2, b=3) == 5
        assert await pool.call("tests.actors.workhorse:add", 2) == 2
        assert await pool.call(workhorse.echo, {"a": (1, b"x", None), 3: np.arange(2)}) == {
            "a": [1, b"x", None],
            3: [0, 1],
        }
        assert await pool.call(workhorse.complain) == "done"
        with pytest.raises(WorkerError, match=r"workhorse:fail raised ValueError: no such card") as failure:
            await pool.call(workhorse.fail, "no such card")
        assert failure.value.reason == "ValueError"
        assert any("in fail" in note for note in failure.value.__notes__), "its traceback is told"
        with pytest.raises(WorkerError, match="a object does not go through a pipe"):
            await pool.call(workhorse.something)
        with pytest.raises(TypeError, match="plain data"):
            await pool.call(workhorse.echo, object())
        assert pool.processes == 1

    with_pool(work)


@pytest.mark.parametrize(
    ("function", "arguments", "reason", "message"),
    [
        (workhorse.hang, (), "timeout", "took longer than 0.2 s"),
        (workhorse.die, (), "died", "was ended by SIGKILL"),
        (workhorse.leave, (), "died", "ended with exit code 3"),
        (workhorse.eat, (4 << 30,), "memory", "needed more than task.process_memory_bytes"),
    ],
)
def test_a_worker_that_misbehaves_is_replaced(
    function: Callable[..., Any], arguments: tuple[Any, ...], reason: str, message: str
) -> None:
    async def work(pool: WorkerPool) -> None:
        first = await pool.call(workhorse.whoami)
        with pytest.raises(WorkerError, match=message) as failure:
            await pool.call(function, *arguments, timeout_s=0.2 if reason == "timeout" else DEADLINE_S)
        assert failure.value.reason == reason
        assert await pool.call(workhorse.whoami) != first

    with_pool(work, memory_bytes=1 << 30)


def test_the_event_loop_goes_on_while_a_worker_hangs() -> None:
    async def work(pool: WorkerPool) -> None:
        hanging = asyncio.create_task(pool.call(workhorse.hang))
        assert await pool.call(workhorse.add, 1, 1) == 2, "another worker takes it"
        assert not hanging.done()
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert pool.processes == 1, "nobody would read what it says: it is gone"

    with_pool(work, size=2)


def test_objects_stay_in_their_process_and_die_with_it() -> None:
    async def work(pool: WorkerPool) -> None:
        async with pool.open(workhorse.Counter, 5) as counter, pool.open(workhorse.Counter, 0) as other:
            first, second = await counter.call("step"), await counter.call("step", by=10)
            assert (first["value"], second["value"]) == (6, 16)
            assert (await other.call("step"))["process"] != first["process"], "objects spread over the workers"
            with pytest.raises(WorkerError, match=r"hang took longer") as timeout:
                await counter.call("hang", timeout_s=0.2)
            assert timeout.value.reason == "timeout"
            with pytest.raises(WorkerError, match="is gone") as gone:
                await counter.call("step")
            assert gone.value.reason == "died"
            assert (await other.call("step"))["value"] == 2

    with_pool(work, size=2)


def test_only_functions_of_modules_can_go() -> None:
    assert import_path(workhorse.Counter.step) == "tests.actors.workhorse:Counter.step"
    with pytest.raises(ValueError, match="must be a module's function"):
        import_path(lambda: 0)


# ------------------------------------------------------------------------------------------------------ in rollouts


def play(reward: Any, **changes: Any) -> tuple[Rollout, Any]:
    async def run() -> tuple[Rollout, Any]:
        settings = RolloutSettings(SAMPLING, TOKENIZER, single_turn.generate, reward, 0, 64, DEADLINE_S)
        settings = replace(settings, isolate_reward=True, **changes)
        tasks = [{"prompt": "1", "wanted": "12"}]
        rollout = Rollout(settings, {"s": tasks}, ScriptedEngine([says("12")]))
        try:
            return rollout, await rollout.run(Reservation(TaskRef(0, "s", 0), 0, 0))
        finally:
            await rollout.close()

    return asyncio.run(run())


def hangs_instead_of_judging(content: Any, answer: str, finish_reason: str) -> float:
    workhorse.hang()
    return 0.0


def test_an_isolated_reward_judges_in_a_worker() -> None:
    _, trajectory = play(workhorse.judge)
    assert trajectory.reward == 1.0


def test_a_killed_worker_is_that_episodes_failure_with_its_reason() -> None:
    rollout, failure = play(hangs_instead_of_judging, worker_timeout_s=0.2)
    assert isinstance(failure, RolloutFailure)
    assert "hangs_instead_of_judging took longer than 0.2 s" in failure.reason
    assert rollout.report()["rollout/failed/WorkerError:timeout"] == 1


# ------------------------------------------------------------------------------------------------------- plug-ins


class Environment:
    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.closed = False

    async def generate(self, task: Any, policy: Any) -> int:
        return self.rounds

    async def close(self) -> None:
        self.closed = True


async def function(task: Any, policy: Any, *, rounds: int = 1) -> int:
    return rounds


def not_async(task: Any, policy: Any) -> None: ...


class NotAsync:
    def generate(self, task: Any, policy: Any) -> None: ...


async def async_reward(content: Any, answer: str, finish_reason: str) -> float:
    return 0.0


@pytest.mark.parametrize("name", ["Environment", "function"])
def test_an_environment_is_a_function_or_a_class_with_arguments(name: str) -> None:
    generate: Any = load_generate(TaskConfig(generate=f"{__name__}:{name}", arguments={"rounds": 3}))
    assert asyncio.run(generate(None, None)) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Environment", {}, "missing 1 required positional argument: 'rounds'"),
        ("Environment", {"round": 3}, "unexpected keyword argument 'round'"),
        ("function", {"round": 3}, "unexpected keyword argument 'round'"),
        ("not_async", {}, "no coroutine function; write async def"),
        ("NotAsync", {}, "its method generate is no coroutine function"),
    ],
)
def test_an_environment_that_cannot_be_called_is_refused_before_the_run(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_generate(TaskConfig(generate=f"{__name__}:{name}", arguments=arguments))


def test_an_async_reward_cannot_be_isolated() -> None:
    with pytest.raises(ConfigError, match="leave out either"):
        load_reward(TaskConfig(reward=f"{__name__}:async_reward", isolate_reward=True))


def test_a_class_is_closed_with_its_rollout() -> None:
    environment = Environment(1)
    settings = RolloutSettings(SAMPLING, TOKENIZER, environment.generate, None, 0, 64, 1.0)  # type: ignore[arg-type]
    asyncio.run(Rollout(settings, {}, ScriptedEngine([])).close())
    assert environment.closed
