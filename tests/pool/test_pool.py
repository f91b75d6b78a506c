"""The engine pool over embedded engines: routes, deaths, restarts, and answers that go on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import Engine, EngineError, SamplingParams
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.actors.pool import EnginePool
from slime_async.protocol import EngineInfo
from slime_async.trajectory import VersionSpan, WeightId
from tests.contract.reference import (
    NEW,
    OLD,
    Checkpoints,
    Learner,
    answer_logprobs,
    ask,
    eventually,
    load_model,
    prompt,
    run,
    tensors_of,
)

CONTEXT = 8192


class Patient(EmbeddedEngine):
    """Hangs when told to: its health check never answers in time."""

    ill = ""

    async def check_health(self) -> None:
        await super().check_health()
        if self.ill:
            raise EngineError(self.ill)


class Ward:
    """Makes the pool's engines and remembers all of them."""

    def __init__(self, checkpoint: Path, weights: WeightId | None = OLD) -> None:
        self.engines: dict[str, Patient] = {}
        self._checkpoint, self._weights = checkpoint, weights

    def make(self, engine_id: str) -> Engine:
        weights = self._weights if "." not in engine_id else None  # the second life waits for the learner
        engine = Patient(self._checkpoint, engine_id=engine_id, weights=weights, slots=4, max_context=CONTEXT)
        self.engines[engine_id] = engine
        return engine


@asynccontextmanager
async def running(ward: Ward, count: int, max_restarts: int = 8) -> AsyncIterator[EnginePool]:
    pool = EnginePool("a", [ward.make] * count, health_interval_s=0.01, max_restarts=max_restarts)
    await pool.start()
    keeping = asyncio.create_task(pool.run())
    try:
        yield pool
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await pool.close()


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def info(engine_id: str) -> EngineInfo:
    return EngineInfo(engine_id, "a", 1, takes_buffers=True)


def test_requests_go_to_the_least_loaded_engine(checkpoints: Checkpoints) -> None:
    async def test() -> None:
        ward = Ward(checkpoints())
        async with running(ward, 2) as pool:
            answers = [asyncio.ensure_future(pool.generate(ask(prompt(4), CONTEXT))) for _ in range(4)]
            for engine in ward.engines.values():
                await eventually(engine, lambda s: s.running_requests == 2)
            for answer in answers:
                answer.cancel()

    run(test())


def test_an_episode_stays_on_its_engine_though_that_has_more_to_do(checkpoints: Checkpoints) -> None:
    async def test() -> None:
        ward = Ward(checkpoints())
        async with running(ward, 2) as pool:
            await pool.generate(replace(ask(prompt(4), 3), session="episode"))
            home, other = ward.engines["a/0"], ward.engines["a/1"]
            load = [asyncio.ensure_future(home.generate(ask(prompt(4), CONTEXT))) for _ in range(2)]
            pool.member("a/0").outstanding += len(load)
            await pool.generate(replace(ask(prompt(7), 3), session="episode"))
            assert (await other.status()).generated_tokens == 0
            await pool.generate(replace(ask(prompt(7), 3), session="another"))
            assert (await other.status()).generated_tokens == 3
            for request in load:
                request.cancel()

    run(test())


def test_a_request_is_taken_back_wherever_it_is(checkpoints: Checkpoints) -> None:
    """From the engine that works on it, with its tokens; and while no engine serves, with none."""

    async def test() -> None:
        ward = Ward(checkpoints())
        async with running(ward, 1) as pool:
            request = ask(prompt(4), CONTEXT)
            answering = asyncio.ensure_future(pool.generate(request))
            await eventually(ward.engines["a/0"], lambda s: s.generated_tokens >= 3)
            await pool.abort(request.request_id)
            answer = await answering
            assert answer.finish_reason == "abort"
            assert len(answer.output_ids) >= 3
            await pool.abort(request.request_id)  # over already: nothing happens
            pool.restart("a/0", "a test")
            await until(lambda: not pool.member(next(iter(pool.infos)).engine_id).has_weights if pool.infos else False)
            waiting = asyncio.ensure_future(pool.generate(request))
            await asyncio.sleep(0)
            assert not waiting.done()
            await pool.abort(request.request_id)
            assert (await waiting).output_ids == []

    run(test())


def test_an_answer_whose_engine_dies_goes_on_elsewhere_with_its_tokens_and_versions(checkpoints: Checkpoints) -> None:
    """The two engines hold different weights, so that the spans can be proven by log-probs."""

    async def test() -> None:
        ward = Ward(checkpoints())
        async with running(ward, 2) as pool:
            async with Learner.joined_by(ward.engines["a/1"]) as learner:
                await learner.broadcast(ward.engines["a/1"], tensors_of(checkpoints(seed=1)), NEW)
            policy = EnginePolicy(pool, SamplingParams(60), EpisodeLimits(CONTEXT), seed=3)
            turn = asyncio.ensure_future(policy.sample(prompt(9)))
            victim = ward.engines["a/0"]
            await eventually(victim, lambda s: s.generated_tokens >= 12)
            await victim.close()
            got = await turn
        boundary = got.spans[1].first_token
        assert got.spans == (VersionSpan(0, OLD), VersionSpan(boundary, NEW))
        assert boundary >= 12
        assert (len(got.output_ids), got.finish_reason, policy.resubmissions) == (60, "length", 1)
        for checkpoint, part in ((checkpoints(), slice(0, boundary)), (checkpoints(seed=1), slice(boundary, 60))):
            expected = answer_logprobs(load_model(checkpoint), prompt(9), got.output_ids)
            torch.testing.assert_close(torch.tensor(got.logprobs)[part], expected[part], atol=1e-4, rtol=0)

    run(test())


def test_a_hung_engine_is_replaced_and_serves_again_once_the_learner_gave_it_weights(checkpoints: Checkpoints) -> None:
    async def test() -> None:
        ward, told = Ward(checkpoints()), []
        async with running(ward, 1) as pool:
            pool.on_change = told.append
            assert pool.infos == (info("a/0"),)
            ward.engines["a/0"].ill = "it hangs"
            await until(lambda: told[-1:] == [(info("a/0.1"),)])
            assert told == [(), (info("a/0.1"),)]
            waiting = asyncio.ensure_future(pool.generate(ask(prompt(4), 5)))
            assert (await pool.status()).weights is None
            tensors, late = tensors_of(checkpoints(seed=1)), ward.engines["a/0.1"]
            async with Learner.joined_by(late) as learner:
                receiving = pool.command(
                    "a/0.1", lambda engine: engine.receive_weights(learner.manifest(tensors), NEW), timeout_s=10.0
                )
                await asyncio.gather(receiving, asyncio.to_thread(learner.group.send, tensors.items()))
            assert (await waiting).spans == (VersionSpan(0, NEW),)
            with pytest.raises(ValueError, match=r"actor a holds a/0\.1, not a/0"):
                pool.member("a/0")
            with pytest.raises(EngineError, match="after close"):
                await ward.engines["a/0"].status()

    run(test())


def test_an_engine_that_is_late_with_a_command_is_given_up(checkpoints: Checkpoints) -> None:
    async def test() -> None:
        ward = Ward(checkpoints())
        async with running(ward, 2) as pool:

            async def never(engine: Engine) -> None:
                await asyncio.Event().wait()

            with pytest.raises(TimeoutError, match=r"engine a/0 is given up: no answer within 0\.01 s"):
                await pool.command("a/0", never, timeout_s=0.01)
            await until(lambda: pool.infos == (info("a/0.1"), info("a/1")))
            assert len((await pool.generate(ask(prompt(4), 5))).output_ids) == 5

    run(test())


def test_an_error_that_is_no_death_reaches_who_asked(checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with running(Ward(checkpoints()), 1) as pool:
            with pytest.raises(ValueError, match="token id 99"):
                await pool.generate(ask([99]))
            with pytest.raises(EngineError, match="no weight group"):
                await pool.command("a/0", lambda engine: engine.receive_weights(None, NEW), 5.0)  # type: ignore[arg-type]
            assert pool.deaths == 0

    run(test())


def test_a_pool_whose_restarts_are_used_up_raises_what_the_last_engine_died_of(checkpoints: Checkpoints) -> None:
    async def test() -> None:
        ward = Ward(checkpoints())
        pool = EnginePool("a", [ward.make], health_interval_s=0.01, max_restarts=0)
        await pool.start()
        ward.engines["a/0"].ill = "its fan stands still"
        with pytest.raises(ExceptionGroup) as caught:
            await pool.run()
        assert caught.group_contains(EngineError, match=r"a/0 is broken, .*actor\.max_restarts.*its fan stands still")
        await pool.close()

    run(test())


def test_an_engine_that_does_not_start_fails_the_pool_by_name(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoints() / "config.json").read_text())

    async def test() -> None:
        pool = EnginePool("a", [Ward(checkpoints()).make, Ward(tmp_path).make])
        with pytest.raises(EngineError, match=r"engine a/1 could not load its weights: .*model\.safetensors"):
            await pool.start()

    run(test())
