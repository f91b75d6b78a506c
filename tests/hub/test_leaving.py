"""Actors that join a running job and leave it: what they hold is finished or returned, weights and credits follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from slime_async.actors import single_turn
from slime_async.actors.engine import GenerateRequest, Generation
from slime_async.actors.pool import EnginePool
from slime_async.actors.rollout import Rollout, RolloutSettings
from slime_async.actors.worker import Worker
from slime_async.config import Config
from slime_async.protocol import Leaving, Ok, PrepareWeights, Relay, ResumeEngine, WeightManifest
from slime_async.trajectory import WeightId
from tests.actors.scripted import SAMPLING, TOKENIZER, ScriptedProcess, says
from tests.hub.players import WAIT_S, Stage, make_config, run, stage


class GatedEngine(ScriptedProcess):
    """Answers once its gate is open."""

    def __init__(self) -> None:
        super().__init__([says("12")])
        self.gate = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> Generation:
        await self.gate.wait()
        return await super().generate(request)

    async def resume(self) -> None: ...


@asynccontextmanager
async def working(hub: Stage, config: Config, engine: GatedEngine) -> AsyncIterator[tuple[Worker, asyncio.Task[bool]]]:
    settings = RolloutSettings(SAMPLING, TOKENIZER, single_turn.generate, lambda *_: 1.0, 0, 64, 10.0)
    rollout = Rollout(settings, {"train": [{"prompt": "+21="}] * 9}, engine)
    worker = Worker(config, "w", EnginePool("w", [lambda _: engine]), rollout)  # type: ignore[list-item, return-value]
    task = asyncio.create_task(worker.run(hub.hub.address))
    try:
        yield worker, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def with_drain(drain_timeout_s: float, **batch: Any) -> Config:
    config = make_config(**batch)
    return config.model_copy(
        update={"actor": config.actor.model_copy(update={"drain_timeout_s": drain_timeout_s, "slots": 3})}
    )


async def until(hub: Stage, observer: Any, **wanted: int) -> None:
    """The queue's statistics, once they are so."""
    while True:
        queue = (await observer.status()).queue
        if all(queue[name] == value for name, value in wanted.items()):
            return


def test_an_actor_that_is_leaving_is_granted_nothing_more_and_may_deliver() -> None:
    async def play() -> None:
        async with stage(make_config()) as hub:
            learner = await hub.learner()
            actor = await hub.actor("a", slots=2)
            await learner.publish(0)
            held = await actor.granted(2)
            assert await actor.call(Leaving()) == Ok()
            await actor.deliver_all(held)
            await actor.granted_nothing()
            other = await hub.actor("b", slots=2)
            assert len(await other.granted(2)) == 2

    run(play())


def test_a_worker_that_is_told_to_leave_finishes_what_it_has_begun() -> None:
    async def play() -> None:
        config, engine = with_drain(WAIT_S), GatedEngine()
        async with stage(config) as hub, working(hub, config, engine) as (worker, task):
            learner, observer = await hub.learner(), await hub.observer()
            await learner.publish(0)
            await until(hub, observer, running=3)
            worker.leave()
            while hub.hub._actors["w"].slots:  # the hub knows, before anything is delivered that more could follow
                await asyncio.sleep(0)
            engine.gate.set()
            assert await task
            await until(hub, observer, queued=3, running=0, reserved=0)
            assert (await observer.status()).queue["returned"] == 0
            assert await learner.members(0) == ()

    run(play())


def test_what_is_not_finished_in_time_is_granted_to_others() -> None:
    async def play() -> None:
        config, engine = with_drain(0.05), GatedEngine()
        async with stage(config) as hub, working(hub, config, engine) as (worker, task):
            learner, observer = await hub.learner(), await hub.observer()
            await learner.publish(0)
            await until(hub, observer, running=3)
            worker.leave()
            assert await task
            assert (await observer.status()).queue["returned"] == 3
            other = await hub.actor("b", slots=3, sources={"train": 9})
            assert len(await other.granted(3)) == 3

    run(play())


def test_a_second_word_to_leave_is_obeyed_at_once() -> None:
    async def play() -> None:
        config, engine = with_drain(1e6), GatedEngine()
        async with stage(config) as hub, working(hub, config, engine) as (worker, task):
            learner, observer = await hub.learner(), await hub.observer()
            await learner.publish(0)
            await until(hub, observer, running=3)
            worker.leave()
            while not task.done():
                worker.leave()
                await observer.status()
            assert task.result()

    run(play())


def test_a_worker_does_not_leave_in_the_middle_of_a_publication() -> None:
    async def play() -> None:
        config, engine = with_drain(WAIT_S), GatedEngine()
        engine.gate.set()
        async with stage(config) as hub, working(hub, config, engine) as (worker, task):
            learner, observer = await hub.learner(), await hub.observer()
            await learner.members(1)
            assert (
                await learner.call(Relay("w", PrepareWeights("scripted", WeightId(1, 1), WeightManifest(())), WAIT_S))
                == Ok()
            )
            worker.leave()
            for _ in range(5):
                await observer.status()
            assert not task.done()
            assert await learner.call(Relay("w", ResumeEngine("scripted"), WAIT_S)) == Ok()
            assert await task

    run(play())
