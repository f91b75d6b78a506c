"""The actor's process against a real hub; its engine answers as a script says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from slime_async.actors import single_turn
from slime_async.actors.engine import EngineError
from slime_async.actors.pool import EnginePool
from slime_async.actors.rollout import Rollout, RolloutSettings
from slime_async.actors.worker import Worker
from slime_async.protocol import Eject, EngineInfo, Finish, Ok, PrepareWeights, Relay, ResumeEngine, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.errors import RemoteError
from tests.actors.scripted import SAMPLING, TOKENIZER, ScriptedProcess, says
from tests.hub.players import WAIT_S, Learner, Stage, make_config, run, stage

Test = Callable[[Stage, Learner, ScriptedProcess, "asyncio.Task[None]"], Awaitable[None]]


def exact(content: Any, text: str, finish_reason: str) -> float:
    return float(text == content["wanted"])


def with_worker(test: Test, **batch: Any) -> None:
    """One worker on tasks that its engine answers rightly, and a learner that has published version 0."""

    async def play() -> None:
        config = make_config(**batch)
        engine = ScriptedProcess([says("12")])
        settings = RolloutSettings(SAMPLING, TOKENIZER, single_turn.generate, exact, 0, 64, 10.0)
        rollout = Rollout(settings, {"train": [{"prompt": "+21=", "wanted": "12"}] * 9}, engine)
        async with stage(config) as hub:
            learner = await hub.learner()
            await learner.publish(0)

            def make(engine_id: str) -> Any:
                if "." in engine_id:  # the one engine plays its successor, too
                    engine.engine_id, engine.state = engine_id, "new"
                return engine

            pool = EnginePool("w", [make])
            worker = asyncio.create_task(Worker(config, "w", pool, rollout).run(hub.hub.address))
            try:
                await test(hub, learner, engine, worker)
            finally:
                worker.cancel()
                await asyncio.gather(worker, return_exceptions=True)
        assert engine.state == "closed"

    run(play())


def test_a_worker_delivers_what_it_is_granted_and_leaves_when_the_run_is_over() -> None:
    async def test(hub: Stage, learner: Learner, engine: ScriptedProcess, worker: asyncio.Task[None]) -> None:
        batch = await learner.leased(0)
        assert [(t.key, t.reward, t.finish_reason) for t in batch.trajectories] == [
            ((task, sample), 1.0, "stop") for task in range(2) for sample in range(2)
        ]
        assert await learner.call(Finish("done")) == Ok()
        await worker
        await hub.running

    with_worker(test)


def test_a_trajectory_that_the_hub_refuses_is_reported_as_failed_and_the_worker_lives() -> None:
    async def test(hub: Stage, learner: Learner, engine: ScriptedProcess, worker: asyncio.Task[None]) -> None:
        while (status := await learner.status()).queue["dropped_failed_groups"] == 0:
            assert not worker.done()
        assert "more than max_trajectory_bytes = 10: raise the limit" in str(status.queue["waiting_for"])
        assert "w" in [peer.name for peer in status.peers]

    with_worker(test, max_trajectory_bytes=10, max_attempts=2)


def test_commands_for_an_engine_that_it_does_not_hold_are_refused() -> None:
    async def test(hub: Stage, learner: Learner, engine: ScriptedProcess, worker: asyncio.Task[None]) -> None:
        await learner.members(1)
        assert (
            await learner.call(Relay("w", PrepareWeights("scripted", WeightId(1, 1), WeightManifest(())), WAIT_S))
            == Ok()
        )
        with pytest.raises(RemoteError, match="actor w holds scripted, not other"):
            await learner.call(Relay("w", ResumeEngine("other"), WAIT_S))

    with_worker(test)


def test_a_command_that_comes_again_is_carried_out_once_unless_it_failed() -> None:
    """The learner asks again when an answer was lost on its way, and when it tries a publication anew."""

    async def test(hub: Stage, learner: Learner, engine: ScriptedProcess, worker: asyncio.Task[None]) -> None:
        await learner.members(1)
        asked: list[WeightManifest] = []

        async def check_weights(manifest: WeightManifest) -> None:
            asked.append(manifest)
            if len(asked) == 1:
                raise EngineError("scripted has no room")

        engine.check_weights = check_weights  # type: ignore[method-assign]
        prepare = Relay("w", PrepareWeights("scripted", WeightId(1, 1), WeightManifest(())), WAIT_S)
        with pytest.raises(RemoteError, match="scripted has no room"):
            await learner.call(prepare)
        for _ in range(2):
            assert await learner.call(prepare) == Ok()
        assert len(asked) == 2

    with_worker(test)


def test_an_ejected_engine_is_restarted_and_the_hub_hears_of_the_new_one() -> None:
    async def test(hub: Stage, learner: Learner, engine: ScriptedProcess, worker: asyncio.Task[None]) -> None:
        [info] = await learner.members(1)
        assert await learner.call(Eject(info, "no answer")) == Ok()
        assert await learner.members(0) == ()
        assert await learner.members(1) == (EngineInfo("w/0.1", "w", 1),)

    with_worker(test)


def test_a_run_that_failed_ends_the_worker_with_the_reason() -> None:
    async def test(hub: Stage, learner: Learner, engine: ScriptedProcess, worker: asyncio.Task[None]) -> None:
        await learner.members(1)
        await learner.client.close()  # before the run was finished
        with pytest.raises(ExceptionGroup) as caught:
            await worker
        assert caught.group_contains(RuntimeError, match="the hub ended the run: learner learner is gone")

    with_worker(test, learner={"max_restarts": 0})
