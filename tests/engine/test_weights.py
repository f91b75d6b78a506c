"""The engine contract, second part: weights arrive in mid-answer, and every token says whose it is."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor

from slime_async.actors.engine import Engine, EngineError, GenerateRequest, Generation, PauseMode
from slime_async.trajectory import VersionSpan
from tests.engine.reference import (
    NEW,
    OLD,
    Checkpoints,
    Learner,
    MakeEngine,
    answer_logprobs,
    ask,
    eventually,
    load_model,
    logprobs_over_old_cache,
    prompt,
    run,
    serving,
    tensors_of,
)

CONTEXT = 8192
PROMPT = prompt(9)


def endless(seed: int) -> GenerateRequest:
    return ask(PROMPT, CONTEXT, seed=seed)


async def change_weights(engine: Engine, mode: PauseMode, tensors: dict[str, Tensor]) -> int:
    """Pause in mid-answer, broadcast the new weights, resume; how many tokens were sampled before."""
    async with Learner.joined_by(engine) as learner:
        await eventually(engine, lambda s: s.generated_tokens >= 12)
        await engine.pause(mode)
        before = await engine.status()
        assert before.paused
        await learner.broadcast(engine, tensors, NEW)
        after = await engine.status()
        assert (after.weights, after.generated_tokens) == (NEW, before.generated_tokens)
        await engine.resume()
    return before.generated_tokens


async def answer_across_weights(engine: Engine, mode: PauseMode, tensors: dict[str, Tensor]) -> tuple[Generation, int]:
    """One answer with 12 tokens or more on both sides of a change of weights, and how many lie before it."""
    request = endless(seed=7)
    answer = asyncio.ensure_future(engine.generate(request))
    boundary = await change_weights(engine, mode, tensors)
    await eventually(engine, lambda s: s.generated_tokens >= boundary + 12)
    await engine.abort(request.request_id)
    return await answer, boundary


@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
def test_an_answer_goes_on_with_new_weights_from_the_token_its_spans_say(
    mode: PauseMode, make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)) as engine:
            answer, boundary = await answer_across_weights(engine, mode, tensors_of(checkpoints(seed=1)))
        assert answer.spans == (VersionSpan(0, OLD), VersionSpan(boundary, NEW))
        assert len(answer.output_ids) >= boundary + 12

        old, new = load_model(checkpoints()), load_model(checkpoints(seed=1))
        got, ids = torch.tensor(answer.logprobs), [*PROMPT, *answer.output_ids]
        by_old, by_new = (answer_logprobs(model, PROMPT, answer.output_ids) for model in (old, new))
        # the last token before the change was sampled, but its keys and values come from the new weights
        mixed = logprobs_over_old_cache(old, new, ids, cached=len(PROMPT) + boundary - 1)
        torch.testing.assert_close(got[:boundary], by_old[:boundary], atol=1e-4, rtol=0)
        expected, other = (mixed, by_new[boundary:]) if mode is PauseMode.IN_PLACE else (by_new[boundary:], mixed)
        torch.testing.assert_close(got[boundary:], expected, atol=1e-4, rtol=0)
        assert (got[boundary:] - other).abs().max() > 0.01, "both modes gave the same: this test tells nothing"

    run(test())


def test_abort_ends_answers_with_what_they_have_and_requests_not_begun_wait_for_new_weights(
    make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=1, max_context=CONTEXT)) as engine:
            cut = asyncio.ensure_future(engine.generate(endless(seed=7)))
            await eventually(engine, lambda s: s.running_requests == 1)
            waiting = asyncio.ensure_future(engine.generate(ask(prompt(4), 8, seed=8)))
            boundary = await change_weights(engine, PauseMode.ABORT, tensors_of(checkpoints(seed=1)))
            partial, later = await cut, await waiting
        assert (len(partial.output_ids), partial.finish_reason) == (boundary, "abort")
        assert partial.spans == (VersionSpan(0, OLD),)
        assert later.spans == (VersionSpan(0, NEW),)
        for checkpoint, ids, answer in ((checkpoints(), PROMPT, partial), (checkpoints(seed=1), prompt(4), later)):
            expected = answer_logprobs(load_model(checkpoint), ids, answer.output_ids)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)

    run(test())


def test_a_paused_engine_samples_nothing_until_it_resumes(make_engine: MakeEngine, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)) as engine:
            request = endless(seed=1)
            running = asyncio.ensure_future(engine.generate(request))
            await eventually(engine, lambda s: s.generated_tokens >= 3)
            await engine.pause(PauseMode.IN_PLACE)
            frozen = (await engine.status()).generated_tokens
            started = asyncio.ensure_future(engine.generate(ask(prompt(4), 5)))
            await eventually(engine, lambda s: s.waiting_requests == 1)
            assert (await engine.status()).generated_tokens == frozen
            await engine.resume()
            assert len((await started).output_ids) == 5
            await engine.abort(request.request_id)
            assert (await running).spans == (VersionSpan(0, OLD),)

    run(test())


def test_weights_that_sampled_nothing_leave_no_span(make_engine: MakeEngine, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)) as engine:
            request = endless(seed=7)
            answer = asyncio.ensure_future(engine.generate(request))
            async with Learner.joined_by(engine) as learner:
                await eventually(engine, lambda s: s.generated_tokens >= 5)
                await engine.pause(PauseMode.IN_PLACE)
                boundary = (await engine.status()).generated_tokens
                for weights in (NEW, NEW._replace(version=5)):
                    await learner.broadcast(engine, tensors_of(checkpoints(seed=1)), weights)
                await engine.resume()
                await eventually(engine, lambda s: s.generated_tokens > boundary)
                await engine.pause(PauseMode.IN_PLACE)
                await learner.broadcast(engine, tensors_of(checkpoints(seed=1)), NEW._replace(version=6))
                await engine.abort(request.request_id)
                spans = (await answer).spans
        assert spans == (VersionSpan(0, OLD), VersionSpan(boundary, NEW._replace(version=5)))

    run(test())


def test_an_engine_without_weights_waits_and_serves_after_the_first_broadcast(
    make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=None, slots=2, max_context=64)) as engine:
            request = ask(prompt(4), 8)
            answer = asyncio.ensure_future(engine.generate(request))
            status = await eventually(engine, lambda s: s.waiting_requests == 1)
            assert (status.weights, status.generated_tokens) == (None, 0)
            async with Learner.joined_by(engine) as learner:
                await learner.broadcast(engine, tensors_of(checkpoints(seed=1)), NEW)
                got = await answer
        expected = answer_logprobs(load_model(checkpoints(seed=1)), prompt(4), got.output_ids)
        torch.testing.assert_close(torch.tensor(got.logprobs), expected, atol=1e-4, rtol=0)
        assert got.spans == (VersionSpan(0, NEW),)

    run(test())


@pytest.mark.parametrize("defect", ["shape", "missing", "unknown"])
def test_weights_of_another_model_are_refused_by_name_and_the_engine_keeps_its_own(
    defect: str, make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    tensors = tensors_of(checkpoints(seed=1))
    name = list(tensors)[-1]
    if defect == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif defect == "missing":
        del tensors[name]
    else:
        name, tensors["model.visual.weight"] = "model.visual.weight", torch.zeros(2)

    async def test() -> None:
        engine = make_engine(checkpoints(), weights=OLD, slots=2, max_context=64)
        async with serving(engine), Learner.joined_by(engine) as learner:
            with pytest.raises((ValueError, EngineError), match=name):
                await learner.broadcast(engine, tensors, NEW)
            kept = await engine.generate(ask(prompt(4), 8))
            await learner.broadcast(engine, tensors_of(checkpoints(seed=1)), NEW)
            renewed = await engine.generate(ask(prompt(4), 8))
        for checkpoint, weights, answer in ((checkpoints(), OLD, kept), (checkpoints(seed=1), NEW, renewed)):
            expected = answer_logprobs(load_model(checkpoint), prompt(4), answer.output_ids)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=0)
            assert answer.spans == (VersionSpan(0, weights),)

    run(test())


def test_weights_need_a_group_and_a_later_group_replaces_the_one_before(
    make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    tensors = tensors_of(checkpoints(seed=1))

    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=64)) as engine:
            async with Learner.joined_by(engine, epoch=1), Learner.joined_by(engine, epoch=2) as learner:
                await learner.broadcast(engine, tensors, NEW)
            assert (await engine.status()).weights == NEW
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=64)) as engine:
            with pytest.raises(EngineError, match="no weight group"):
                await engine.receive_weights(None, NEW)  # type: ignore[arg-type]

    run(test())
