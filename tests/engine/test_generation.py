"""The engine contract, first part: what comes out of an engine is what the model and the request say."""

from __future__ import annotations

import asyncio

import pytest
import torch

from slime_async.actors.engine import GenerateRequest
from slime_async.trajectory import VersionSpan
from tests.engine.reference import (
    OLD,
    Checkpoints,
    MakeEngine,
    answer_logprobs,
    ask,
    eventually,
    greedy_answer,
    load_model,
    prompt,
    run,
    serving,
)

TOLERANCE = 1e-4
"""Of log-probabilities in fp32"""


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3-untied", "qwen2", "llama3"])
def test_logprobs_of_sampled_tokens_equal_those_of_transformers(
    architecture: str, make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    checkpoint = checkpoints(architecture)
    prompts = [prompt(length) for length in (1, 2, 17, 17, 40, 90)]
    requests = [
        ask(ids, 20, temperature=temperature, seed=i) for temperature in (1.0, 0.7) for i, ids in enumerate(prompts)
    ]

    async def test() -> None:
        async with serving(make_engine(checkpoint, weights=OLD, slots=8, max_context=128)) as engine:
            answers = await asyncio.gather(*map(engine.generate, requests))
        model = load_model(checkpoint)
        for request, answer in zip(requests, answers, strict=True):
            expected = answer_logprobs(model, request.prompt_ids, answer.output_ids, request.sampling.temperature)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=TOLERANCE, rtol=0)
            assert answer.spans == (VersionSpan(0, OLD),)

    run(test())


def test_temperature_zero_takes_the_most_probable_token(make_engine: MakeEngine, checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints()
    prompts = [prompt(length) for length in (1, 9, 30)]

    async def test() -> None:
        async with serving(make_engine(checkpoint, weights=OLD, slots=8, max_context=64)) as engine:
            answers = await asyncio.gather(*(engine.generate(ask(ids, temperature=0.0)) for ids in prompts))
        model = load_model(checkpoint)
        for ids, answer in zip(prompts, answers, strict=True):
            assert answer.output_ids == greedy_answer(model, ids, 16)
            expected = answer_logprobs(model, ids, answer.output_ids, temperature=1.0)
            torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=TOLERANCE, rtol=0)

    run(test())


def test_a_stop_token_ends_the_answer_and_is_part_of_it(make_engine: MakeEngine, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
            whole = await engine.generate(ask(prompt(5), 16, seed=1))
            stop = whole.output_ids[6]
            end = whole.output_ids.index(stop) + 1
            stopped, other = await asyncio.gather(
                engine.generate(ask(prompt(5), 16, seed=1, stop_token_ids=(999, stop))),
                engine.generate(ask(prompt(5), 16, seed=1)),
            )
        assert (stopped.output_ids, stopped.finish_reason) == (whole.output_ids[:end], "stop")
        assert len(stopped.logprobs) == end
        assert (other.output_ids, other.finish_reason) == (whole.output_ids, "length")

    run(test())


@pytest.mark.parametrize(
    ("prompt_tokens", "max_new_tokens", "expected"), [(4, 1, 1), (4, 7, 7), (20, 99, 12), (31, 9, 1)]
)
def test_an_answer_is_as_long_as_asked_and_as_the_context_has_room(
    prompt_tokens: int, max_new_tokens: int, expected: int, make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=32)) as engine:
            answer = await engine.generate(ask(prompt(prompt_tokens), max_new_tokens))
        assert (len(answer.output_ids), answer.finish_reason) == (expected, "length")

    run(test())


def test_a_seed_gives_the_same_answer_alone_in_a_crowd_and_in_two_parts(
    make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
            alone = await engine.generate(ask(prompt(11), 30, seed=42))
            crowd = [engine.generate(ask(prompt(3 + i % 20, seed=i), 5 + i, seed=i)) for i in range(20)]
            among_others, *_ = await asyncio.gather(engine.generate(ask(prompt(11), 30, seed=42)), *crowd)
            first = await engine.generate(ask(prompt(11), 13, seed=42))
            rest = await engine.generate(ask([*prompt(11), *first.output_ids], 17, seed=42, resumed_tokens=13))
            other_seed = await engine.generate(ask(prompt(11), 30, seed=43))
        assert among_others.output_ids == alone.output_ids
        assert first.output_ids + rest.output_ids == alone.output_ids
        assert rest.logprobs == pytest.approx(alone.logprobs[13:], abs=TOLERANCE)
        assert other_seed.output_ids != alone.output_ids

    run(test())


def test_without_a_seed_answers_differ(make_engine: MakeEngine, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
            one, other = await asyncio.gather(*(engine.generate(ask(prompt(4), 40)) for _ in range(2)))
        assert one.output_ids != other.output_ids

    run(test())


def test_aborting_one_request_returns_its_tokens_and_leaves_the_others(
    make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    requests = [ask(prompt(4), 8000, seed=i) for i in range(2)]

    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=8192)) as engine:
            answers = [asyncio.ensure_future(engine.generate(request)) for request in requests]
            waiting = asyncio.ensure_future(engine.generate(ask(prompt(4), 5)))
            await eventually(engine, lambda s: s.generated_tokens >= 10 and s.waiting_requests == 1)
            await engine.abort(requests[0].request_id[:-1])  # a prefix is another request's name
            await engine.abort("nobody's")
            assert (await engine.status()).running_requests == 2
            await engine.abort(requests[0].request_id)
            aborted = await answers[0]
            assert aborted.finish_reason == "abort"
            assert 0 < len(aborted.output_ids) == len(aborted.logprobs) < 8000
            assert (await waiting).finish_reason == "length"
            assert not answers[1].done()
            await engine.abort(requests[1].request_id)
            await answers[1]

    run(test())


def test_aborting_a_request_that_has_not_begun_returns_no_tokens(
    make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    running, waiting = ask(prompt(4), 8000), ask(prompt(4), 8)

    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=1, max_context=8192)) as engine:
            first, second = (asyncio.ensure_future(engine.generate(request)) for request in (running, waiting))
            await eventually(engine, lambda s: (s.running_requests, s.waiting_requests) == (1, 1))
            await engine.abort(waiting.request_id)
            answer = await second
            assert (answer.output_ids, answer.logprobs, answer.spans) == ([], [], ())
            assert answer.finish_reason == "abort"
            await engine.abort(running.request_id)
            await first

    run(test())


def test_cancelling_generate_frees_its_slot(make_engine: MakeEngine, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=1, max_context=8192)) as engine:
            endless = asyncio.ensure_future(engine.generate(ask(prompt(4), 8000)))
            await eventually(engine, lambda s: s.generated_tokens >= 3)
            endless.cancel()
            answer = await engine.generate(ask(prompt(4), 6))
            assert len(answer.output_ids) == 6
            assert endless.cancelled()
            status = await eventually(engine, lambda s: s.running_requests == 0)
            assert status.waiting_requests == 0

    run(test())


def test_more_requests_than_slots_all_finish(make_engine: MakeEngine, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
            requests = [ask(prompt(1 + i % 13, seed=i), 1 + i % 11, seed=i) for i in range(300)]
            answers = await asyncio.gather(*map(engine.generate, requests))
            status = await engine.status()
        assert [len(answer.output_ids) for answer in answers] == [1 + i % 11 for i in range(300)]
        assert status.generated_tokens == sum(1 + i % 11 for i in range(300))
        assert (status.running_requests, status.waiting_requests) == (0, 0)

    run(test())


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (ask([]), "prompt is empty"),
        (ask([1, 33]), "token id 33 "),
        (ask([-1]), "token id -1 "),
        (ask([1] * 32), "prompt of 32 tokens .* context of 32"),
        (ask([1], 0), "max_new_tokens = 0"),
        (ask([1], temperature=-0.5), "temperature = -0.5"),
        (ask([1], temperature=float("nan")), "temperature = nan"),
        (ask([1], top_p=0.0), "top_p = 0.0"),
        (ask([1], top_p=1.5), "top_p = 1.5"),
        (ask([1], seed=-1), "seed = -1"),
        (ask([1], seed=2**64), f"seed = {2**64}"),
        (ask([1], resumed_tokens=2), "resumed_tokens = 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_served_is_refused_by_its_value(
    request_: GenerateRequest, complaint: str, make_engine: MakeEngine, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(make_engine(checkpoints(), weights=OLD, slots=2, max_context=32)) as engine:
            with pytest.raises(ValueError, match=complaint):
                await engine.generate(request_)
            assert len((await engine.generate(ask([1], 3))).output_ids) == 3

    run(test())
