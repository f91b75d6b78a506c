"""What only the embedded engine has: a decode thread that may die, groups left in the middle, slots that are fixed."""

from __future__ import annotations

import asyncio

import pytest

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.embedded.scheduler import Scheduler
from slime_async.actors.engine import EngineError, PauseMode
from slime_async.transport.weight_group import WeightGroup, WeightGroupError, WeightGroupTimeoutError, host_group
from tests.contract.reference import (
    NEW,
    OLD,
    Checkpoints,
    Learner,
    ask,
    eventually,
    prompt,
    run,
    serving,
    tensors_of,
)


def test_a_dead_decode_thread_fails_open_and_later_calls_with_its_cause(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(scheduler: Scheduler) -> None:
        raise MemoryError("no room for row 3")

    async def test() -> None:
        async with serving(EmbeddedEngine(checkpoints(), weights=OLD, slots=1, max_context=8192)) as engine:
            requests = [asyncio.ensure_future(engine.generate(ask(prompt(4), 8000))) for _ in range(3)]
            await eventually(engine, lambda s: s.generated_tokens >= 3)
            monkeypatch.setattr(Scheduler, "step", die)
            outcomes = await asyncio.gather(*requests, return_exceptions=True)
            for call in (engine.generate(ask(prompt(4))), engine.resume(), engine.status()):
                with pytest.raises(EngineError, match="died: no room for row 3") as later:
                    await call
                outcomes.append(later.value)
        assert all(isinstance(o, EngineError) and "no room for row 3" in str(o) for o in outcomes)
        assert all(isinstance(o, EngineError) and isinstance(o.__cause__, MemoryError) for o in outcomes)

    run(test())


def test_a_cancelled_join_leaves_the_group_when_it_has_formed(checkpoints: Checkpoints) -> None:
    spec, store = host_group("weights", 1, 2, "gloo", timeout_s=10.0)

    async def test() -> None:
        async with serving(EmbeddedEngine(checkpoints(), weights=OLD, slots=1, max_context=64)) as engine:
            joining = asyncio.ensure_future(engine.join_weight_group(spec, 1))
            await asyncio.sleep(0)
            joining.cancel()
            group = await asyncio.to_thread(WeightGroup.create, spec, 0)
            with pytest.raises(WeightGroupError) as broken:
                await asyncio.to_thread(group.send, tensors_of(checkpoints()).items())
            assert not isinstance(broken.value, WeightGroupTimeoutError)
            with pytest.raises(EngineError, match="no weight group"):
                await engine.receive_weights(Learner.manifest(tensors_of(checkpoints())), NEW)
            async with Learner.joined_by(engine, epoch=2) as learner:
                await learner.broadcast(engine, tensors_of(checkpoints()), NEW)

    run(test())
    del store


def test_a_cancelled_broadcast_leaves_its_group_and_the_old_weights_and_the_next_one_works(
    checkpoints: Checkpoints,
) -> None:
    tensors = tensors_of(checkpoints())

    async def test() -> None:
        async with serving(EmbeddedEngine(checkpoints(), weights=OLD, slots=1, max_context=64)) as engine:
            async with Learner.joined_by(engine, epoch=1) as learner:
                receiving = asyncio.ensure_future(engine.receive_weights(Learner.manifest(tensors), NEW))
                await asyncio.sleep(0)
                receiving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await receiving
                sending = asyncio.to_thread(learner.group.send, tensors.items())
                (outcome,) = await asyncio.gather(sending, return_exceptions=True)
                # the bytes may all have been taken before the engine left; nobody waits for the deadline
                assert outcome is None or type(outcome) is WeightGroupError
                assert (await engine.status()).weights == OLD
            async with Learner.joined_by(engine, epoch=2) as learner:
                await learner.broadcast(engine, tensors, NEW)
                assert (await engine.status()).weights == NEW

    run(test())


def test_with_fixed_slots_an_answer_is_bitwise_the_same_in_any_company(checkpoints: Checkpoints) -> None:
    requests = [ask(prompt(1 + 10 * (i % 2), seed=i), 1 + i, seed=i) for i in range(20)]

    async def test() -> None:
        engine = EmbeddedEngine(checkpoints(), weights=OLD, slots=8, max_context=64, fixed_slots=True)
        async with serving(engine):
            alone = [await engine.generate(request) for request in requests]
            await engine.pause(PauseMode.IN_PLACE)  # all at once, so that they share what can be shared
            crowd = asyncio.gather(*map(engine.generate, requests))
            await eventually(engine, lambda s: s.waiting_requests == len(requests))
            await engine.resume()
            assert await crowd == alone

    run(test())


def test_computing_is_reported_in_stretches_that_do_not_overlap(checkpoints: Checkpoints) -> None:
    stretches: list[tuple[int, int]] = []

    async def test() -> None:
        engine = EmbeddedEngine(
            checkpoints(),
            weights=OLD,
            slots=2,
            max_context=64,
            on_busy=lambda first, last: stretches.append((first, last)),
        )
        async with serving(engine):
            for _ in range(3):
                await engine.generate(ask(prompt(4), 4))

    run(test())
    times = [time for stretch in stretches for time in stretch]
    assert stretches
    assert times == sorted(times)
