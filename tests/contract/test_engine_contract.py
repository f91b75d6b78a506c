"""The engine contract: what every implementation of ``Engine`` does, whatever runs behind it.

First, what comes out is what the model and the request say; second, weights arrive in mid-answer, and every token says
whose it is; third, an engine that ends takes nobody with it silently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slime_async.actors.engine import Engine, EngineError, GenerateRequest, Generation, PauseMode
from slime_async.learner.snapshots import WeightBuffers
from slime_async.trajectory import VersionSpan
from slime_async.transport.shared_tensors import Shares
from slime_async.transport.weight_group import WeightGroupError
from tests.contract.reference import (
    NEW,
    OLD,
    SMALL_BUFFER_BYTES,
    Bench,
    Checkpoints,
    Learner,
    answer_logprobs,
    ask,
    eventually,
    greedy_answer,
    load_model,
    logprobs_over_old_cache,
    prompt,
    run,
    serving,
    side_by_side,
    tensors_of,
)

CONTEXT = 8184
PROMPT = prompt(9)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3-untied", "qwen2", "llama3"])
def test_logprobs_of_sampled_tokens_equal_those_of_transformers(
    architecture: str, bench: Bench, checkpoints: Checkpoints
) -> None:
    checkpoint = checkpoints(architecture)
    prompts = [prompt(length) for length in (1, 2, 17, 17, 40, 90)]
    requests = [
        ask(ids, 20, temperature=temperature, seed=i) for temperature in (1.0, 0.7) for i, ids in enumerate(prompts)
    ]

    async def test() -> None:
        async with serving(bench.make(checkpoint, weights=OLD, slots=8, max_context=128)) as engine:
            answers = await asyncio.gather(*map(engine.generate, requests))
        model = load_model(checkpoint)
        errors: list[float] = []
        for request, answer in zip(requests, answers, strict=True):
            expected = answer_logprobs(model, request.prompt_ids, answer.output_ids, request.sampling.temperature)
            close_to(bench, answer.logprobs, expected)
            errors += (torch.tensor(answer.logprobs) - expected).abs().tolist()
            assert answer.spans == (VersionSpan(0, OLD),)
        assert sum(errors) / len(errors) < bench.mean_tolerance

    run(test())


def test_temperature_zero_takes_the_most_probable_token(bench: Bench, checkpoints: Checkpoints) -> None:
    checkpoint = checkpoints()
    prompts = [prompt(length) for length in (1, 9, 30)]

    async def test() -> None:
        async with serving(bench.make(checkpoint, weights=OLD, slots=8, max_context=64)) as engine:
            answers = await asyncio.gather(*(engine.generate(ask(ids, temperature=0.0)) for ids in prompts))
        model = load_model(checkpoint)
        for ids, answer in zip(prompts, answers, strict=True):
            assert answer.output_ids == greedy_answer(model, ids, 16)
            expected = answer_logprobs(model, ids, answer.output_ids, temperature=1.0)
            close_to(bench, answer.logprobs, expected)

    run(test())


def test_a_stop_token_ends_the_answer_and_is_part_of_it(bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
            whole = await engine.generate(ask(prompt(5), 16, temperature=0.0))
            stop = whole.output_ids[6]
            end = whole.output_ids.index(stop) + 1
            stopped, other = await asyncio.gather(
                engine.generate(ask(prompt(5), 16, temperature=0.0, stop_token_ids=(999, stop))),
                engine.generate(ask(prompt(5), 16, temperature=0.0)),
            )
        assert (stopped.output_ids, stopped.finish_reason) == (whole.output_ids[:end], "stop")
        assert len(stopped.logprobs) == end
        assert (other.output_ids, other.finish_reason) == (whole.output_ids, "length")

    run(test())


@pytest.mark.parametrize(
    ("prompt_tokens", "max_new_tokens", "expected"), [(4, 1, 1), (4, 7, 7), (20, 99, 12), (31, 9, 1)]
)
def test_an_answer_is_as_long_as_asked_and_as_the_context_has_room(
    prompt_tokens: int, max_new_tokens: int, expected: int, bench: Bench, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=32)) as engine:
            answer = await engine.generate(ask(prompt(prompt_tokens), max_new_tokens))
        assert (len(answer.output_ids), answer.finish_reason) == (expected, "length")

    run(test())


def test_a_seed_gives_the_same_answer_alone_in_a_crowd_and_in_two_parts(bench: Bench, checkpoints: Checkpoints) -> None:
    if not bench.seeded:
        pytest.skip(f"{bench.name} samples by seed only with enable_deterministic_inference, which CPUs do not have")

    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
            alone = await engine.generate(ask(prompt(11), 30, seed=42))
            crowd = [engine.generate(ask(prompt(3 + i % 20, seed=i), 5 + i, seed=i)) for i in range(20)]
            among_others, *_ = await asyncio.gather(engine.generate(ask(prompt(11), 30, seed=42)), *crowd)
            first = await engine.generate(ask(prompt(11), 13, seed=42))
            rest = await engine.generate(ask([*prompt(11), *first.output_ids], 17, seed=42, resumed_tokens=13))
            other_seed = await engine.generate(ask(prompt(11), 30, seed=43))
        assert among_others.output_ids == alone.output_ids
        assert first.output_ids + rest.output_ids == alone.output_ids
        assert rest.logprobs == pytest.approx(alone.logprobs[13:], abs=bench.tolerance)
        assert other_seed.output_ids != alone.output_ids

    run(test())


def test_without_a_seed_answers_differ(bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
            one, other = await asyncio.gather(*(engine.generate(ask(prompt(4), 40)) for _ in range(2)))
        assert one.output_ids != other.output_ids

    run(test())


def test_aborting_one_request_returns_its_tokens_and_leaves_the_others(bench: Bench, checkpoints: Checkpoints) -> None:
    endless, next_one = ask(prompt(4), 8000), ask(prompt(4), 5)

    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=1, max_context=CONTEXT)) as engine:
            answer = asyncio.ensure_future(engine.generate(endless))
            waiting = asyncio.ensure_future(engine.generate(next_one))
            await eventually(engine, lambda s: s.generated_tokens >= 10 and s.waiting_requests == 1)
            await engine.abort(endless.request_id[:-1])  # a prefix is another request's name
            await engine.abort("nobody's")
            status = await engine.status()
            assert (status.running_requests, status.waiting_requests) == (1, 1)
            await engine.abort(endless.request_id)
            aborted = await answer
            assert aborted.finish_reason == "abort"
            assert 0 < len(aborted.output_ids) == len(aborted.logprobs) < 8000
            close_to(bench, aborted.logprobs, answer_logprobs(load_model(checkpoints()), prompt(4), aborted.output_ids))
            assert (await waiting).finish_reason == "length"

    run(test())


def test_aborting_a_request_that_has_not_begun_returns_no_tokens(bench: Bench, checkpoints: Checkpoints) -> None:
    running, waiting = ask(prompt(4), 8000), ask(prompt(4), 8)

    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=1, max_context=CONTEXT)) as engine:
            first, second = (asyncio.ensure_future(engine.generate(request)) for request in (running, waiting))
            await eventually(engine, lambda s: (s.running_requests, s.waiting_requests) == (1, 1))
            await engine.abort(waiting.request_id)
            answer = await second
            assert (answer.output_ids, answer.logprobs, answer.spans) == ([], [], ())
            assert answer.finish_reason == "abort"
            await engine.abort(running.request_id)
            await first

    run(test())


@pytest.mark.parametrize("length", [600, 4000])
def test_long_prompts_are_read_to_their_end(length: int, bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)) as engine:
            answer = await engine.generate(ask(prompt(length), 6))
        expected = answer_logprobs(load_model(checkpoints()), prompt(length), answer.output_ids)
        close_to(bench, answer.logprobs, expected)

    run(test())


def test_an_answer_is_handed_over_piece_by_piece_and_a_broken_off_one_keeps_its_pieces(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        engine = bench.make(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)
        async with serving(engine):
            answer = asyncio.ensure_future(engine.generate(ask(PROMPT, 8000)))
            await eventually(engine, lambda s: 0 < s.generated_tokens < 8000)
        with pytest.raises(EngineError, match="closed") as broken_off:
            await answer
        partial = broken_off.value.partial
        assert partial is not None
        assert partial.spans == (VersionSpan(0, OLD),)
        close_to(bench, partial.logprobs, answer_logprobs(load_model(checkpoints()), PROMPT, partial.output_ids))

    run(test())


def test_cancelling_generate_frees_its_slot(bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=1, max_context=CONTEXT)) as engine:
            endless = asyncio.ensure_future(engine.generate(ask(prompt(4), 8000)))
            await eventually(engine, lambda s: s.generated_tokens >= 3)
            endless.cancel()
            answer = await engine.generate(ask(prompt(4), 6))
            assert len(answer.output_ids) == 6
            assert endless.cancelled()
            status = await eventually(engine, lambda s: s.running_requests == 0)
            assert status.waiting_requests == 0

    run(test())


def test_more_requests_than_slots_all_finish(bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=8, max_context=64)) as engine:
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
    request_: GenerateRequest, complaint: str, bench: Bench, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=32)) as engine:
            with pytest.raises(ValueError, match=complaint):
                await engine.generate(request_)
            assert len((await engine.generate(ask([1], 3))).output_ids) == 3

    run(test())


# ------------------------------------------------------------------------------------------ weights in mid-answer


def endless(seed: int) -> GenerateRequest:
    return ask(PROMPT, CONTEXT, seed=seed)


async def change_weights(bench: Bench, engine: Engine, mode: PauseMode, checkpoint: Path) -> None:
    """Pause in mid-answer, broadcast the new weights, resume."""
    async with Learner.joined_by(engine, backend=bench.backend) as learner:
        await eventually(engine, lambda s: s.generated_tokens >= 12)
        await engine.pause(mode)
        assert (await engine.status()).paused
        await learner.broadcast(engine, tensors_of(checkpoint, bench.device), NEW)
        after = await engine.status()
        assert after.weights == NEW
        assert after.paused
        await engine.resume()


async def answer_across_weights(bench: Bench, engine: Engine, mode: PauseMode, checkpoint: Path) -> Generation:
    """One answer with 12 tokens or more on both sides of a change of weights."""
    request = endless(seed=7)
    answer = asyncio.ensure_future(engine.generate(request))
    await change_weights(bench, engine, mode, checkpoint)
    boundary = (await engine.status()).generated_tokens + bench.unreported_tokens
    await eventually(engine, lambda s: s.generated_tokens >= boundary + 12)
    await engine.abort(request.request_id)
    return await answer


def close_to(bench: Bench, got: Tensor | list[float], expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(got), expected, atol=bench.tolerance, rtol=0)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("mode", [PauseMode.IN_PLACE, PauseMode.RETRACT])
def test_an_answer_goes_on_with_new_weights_from_the_token_its_spans_say(
    mode: PauseMode, overlap: bool, bench: Bench, checkpoints: Checkpoints
) -> None:
    """The boundary is proven token by token: both versions' log-probs differ, and each fits its side alone."""

    async def test() -> None:
        engine = bench.make(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT, overlap=overlap)
        async with serving(engine):
            answer = await answer_across_weights(bench, engine, mode, checkpoints(seed=1))
        boundary = answer.spans[1].first_token
        assert answer.spans == (VersionSpan(0, OLD), VersionSpan(boundary, NEW))
        assert 12 <= boundary <= len(answer.output_ids) - 12

        old, new = load_model(checkpoints()), load_model(checkpoints(seed=1))
        got, ids = torch.tensor(answer.logprobs), [*PROMPT, *answer.output_ids]
        by_old, by_new = (answer_logprobs(model, PROMPT, answer.output_ids) for model in (old, new))
        # the last token before the change was sampled, but its keys and values come from the new weights
        mixed = logprobs_over_old_cache(old, new, ids, cached=len(PROMPT) + boundary - 1)
        close_to(bench, got[:boundary], by_old[:boundary])
        expected, other = (mixed, by_new[boundary:]) if mode is PauseMode.IN_PLACE else (by_new[boundary:], mixed)
        close_to(bench, got[boundary:], expected)
        assert (got[boundary:] - other).abs().max() > 2 * bench.tolerance, "both modes gave the same"
        assert (by_old - by_new).abs().median() > 2 * bench.tolerance, "both weights give the same"

    run(test())


def test_abort_ends_answers_with_what_they_have_and_requests_not_begun_wait_for_new_weights(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=1, max_context=CONTEXT)) as engine:
            cut = asyncio.ensure_future(engine.generate(endless(seed=7)))
            await eventually(engine, lambda s: s.running_requests == 1)
            waiting = asyncio.ensure_future(engine.generate(ask(prompt(4), 8, seed=8)))
            await change_weights(bench, engine, PauseMode.ABORT, checkpoints(seed=1))
            partial, later = await cut, await waiting
        assert partial.finish_reason == "abort"
        assert 12 <= len(partial.output_ids) < CONTEXT - len(PROMPT)
        assert partial.spans == (VersionSpan(0, OLD),)
        assert later.spans == (VersionSpan(0, NEW),)
        for checkpoint, ids, answer in ((checkpoints(), PROMPT, partial), (checkpoints(seed=1), prompt(4), later)):
            close_to(bench, answer.logprobs, answer_logprobs(load_model(checkpoint), ids, answer.output_ids))

    run(test())


def test_a_paused_engine_samples_nothing_until_it_resumes(bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)) as engine:
            request = endless(seed=1)
            running = asyncio.ensure_future(engine.generate(request))
            await eventually(engine, lambda s: s.generated_tokens >= 3)
            await engine.pause(PauseMode.IN_PLACE)
            await engine.check_health()  # a pause is no illness
            started = asyncio.ensure_future(engine.generate(ask(prompt(4), 5)))
            await eventually(engine, lambda s: s.waiting_requests == 1)
            await asyncio.sleep(bench.reported_within_s)
            frozen = (await engine.status()).generated_tokens
            await asyncio.sleep(0.3)
            assert (await engine.status()).generated_tokens == frozen
            await engine.resume()
            assert len((await started).output_ids) == 5
            await engine.abort(request.request_id)
            assert (await running).spans == (VersionSpan(0, OLD),)

    run(test())


def test_weights_that_sampled_nothing_leave_no_span(bench: Bench, checkpoints: Checkpoints) -> None:
    later = NEW._replace(version=5)

    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)) as engine:
            request = endless(seed=7)
            answer = asyncio.ensure_future(engine.generate(request))
            async with Learner.joined_by(engine, backend=bench.backend) as learner:
                await eventually(engine, lambda s: s.generated_tokens >= 5)
                await engine.pause(PauseMode.IN_PLACE)
                for weights in (NEW, later):
                    await learner.broadcast(engine, tensors_of(checkpoints(seed=1), bench.device), weights)
                before = (await engine.status()).generated_tokens
                await engine.resume()
                await eventually(engine, lambda s: s.generated_tokens > before + bench.unreported_tokens)
                await engine.abort(request.request_id)
                spans = (await answer).spans
        assert [span.weights for span in spans] == [OLD, later]

    run(test())


def test_what_was_cached_under_older_weights_is_not_reused(bench: Bench, checkpoints: Checkpoints) -> None:
    shared = prompt(200)

    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=CONTEXT)) as engine:
            await engine.generate(ask(shared, 4))
            async with Learner.joined_by(engine, backend=bench.backend) as learner:
                await engine.pause(PauseMode.IN_PLACE)
                await learner.broadcast(engine, tensors_of(checkpoints(seed=1), bench.device), NEW)
                await engine.resume()
            answers = [await engine.generate(ask(shared, 8)) for _ in range(2)]
        for answer in answers:
            close_to(
                bench, answer.logprobs, answer_logprobs(load_model(checkpoints(seed=1)), shared, answer.output_ids)
            )
            assert answer.spans == (VersionSpan(0, NEW),)

    run(test())


def test_without_the_version_in_the_cache_key_older_prefixes_would_be_reused(
    bench: Bench, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test before this one tests something."""
    if bench.name == "embedded":
        pytest.skip("the embedded engine keeps no prefixes")
    monkeypatch.setattr("slime_async.actors.sglang.engine.cache_key", lambda weights: "the same for all")
    with pytest.raises(AssertionError, match="not close"):
        test_what_was_cached_under_older_weights_is_not_reused(bench, checkpoints)


def test_an_engine_without_weights_waits_and_serves_after_the_first_broadcast(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=None, slots=2, max_context=64)) as engine:
            answer = asyncio.ensure_future(engine.generate(ask(prompt(4), 8)))
            status = await eventually(engine, lambda s: s.waiting_requests == 1)
            assert (status.weights, status.generated_tokens) == (None, 0)
            async with Learner.joined_by(engine, backend=bench.backend) as learner:
                await learner.broadcast(engine, tensors_of(checkpoints(seed=1), bench.device), NEW)
                got = await answer
        close_to(bench, got.logprobs, answer_logprobs(load_model(checkpoints(seed=1)), prompt(4), got.output_ids))
        assert got.spans == (VersionSpan(0, NEW),)

    run(test())


@pytest.mark.parametrize("defect", ["shape", "missing", "unknown"])
def test_weights_of_another_model_are_refused_by_name_before_anybody_sends_them(
    defect: str, bench: Bench, checkpoints: Checkpoints
) -> None:
    right = tensors_of(checkpoints(seed=1), bench.device)
    wrong = dict(right)
    name = list(wrong)[-1]
    if defect == "shape":
        wrong[name] = wrong[name][:-1].clone()
    elif defect == "missing":
        del wrong[name]
    else:
        name, wrong["model.visual.weight"] = "model.visual.weight", torch.zeros(2, device=bench.device)

    async def test() -> None:
        engine = bench.make(checkpoints(), weights=OLD, slots=2, max_context=64)
        async with serving(engine), Learner.joined_by(engine, backend=bench.backend) as learner:
            with pytest.raises(ValueError, match=name):
                await engine.check_weights(learner.manifest(wrong))
            kept = await engine.generate(ask(prompt(4), 8))
            await learner.broadcast(engine, right, NEW)
            renewed = await engine.generate(ask(prompt(4), 8))
        for checkpoint, weights, answer in ((checkpoints(), OLD, kept), (checkpoints(seed=1), NEW, renewed)):
            close_to(bench, answer.logprobs, answer_logprobs(load_model(checkpoint), prompt(4), answer.output_ids))
            assert answer.spans == (VersionSpan(0, weights),)

    run(test())


def test_weights_can_be_taken_out_of_the_learners_memory_instead_of_a_broadcast(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    device = bench.device if bench.device == "cpu" else "cuda:0"  # the engine's own
    buffers = WeightBuffers.allocate(
        Learner.manifest(tensors_of(checkpoints(seed=1))), torch.device(device), buffer_bytes=4096
    )
    shares = Shares()

    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=64)) as engine:
            for seed, version in ((1, 4), (0, 5), (1, 6)):  # the buffers are used again and again
                tensors = tensors_of(checkpoints(seed=seed), device)
                for buffer, tensor in zip(buffers.tensors, tensors.values(), strict=True):
                    buffer.copy_(tensor)
                weights = NEW._replace(version=version)
                await engine.pause(PauseMode.IN_PLACE)
                if device != "cpu":
                    torch.cuda.synchronize()
                shared = [shares.share(buffer) for buffer in buffers.tensors]
                await engine.receive_weights(Learner.manifest(tensors), weights, shared)
                await engine.resume()
                answer = await engine.generate(ask(prompt(4), 8))
                expected = answer_logprobs(load_model(checkpoints(seed=seed)), prompt(4), answer.output_ids)
                close_to(bench, answer.logprobs, expected)
                assert answer.spans == (VersionSpan(0, weights),)

    run(test())


@pytest.mark.parametrize("buffer_bytes", [0, 1, 1 << 30], ids=["each by itself", "a buffer each", "one buffer"])
def test_weights_come_tensor_by_tensor_or_side_by_side(
    buffer_bytes: int, bench: Bench, checkpoints: Checkpoints
) -> None:
    tensors = tensors_of(checkpoints(seed=1), bench.device)

    async def test() -> None:
        engine = bench.make(checkpoints(), weights=OLD, slots=2, max_context=64)
        async with serving(engine), Learner.joined_by(engine, backend=bench.backend) as learner:
            assert engine.takes_buffers
            await learner.broadcast(engine, tensors, NEW, buffer_bytes)
            answer = await engine.generate(ask(prompt(4), 8))
        expected = answer_logprobs(load_model(checkpoints(seed=1)), prompt(4), answer.output_ids)
        close_to(bench, answer.logprobs, expected)
        assert answer.spans == (VersionSpan(0, NEW),)

    run(test())


@pytest.mark.parametrize("in_buffers", [False, True])
def test_an_engine_outlives_a_learner_that_leaves_in_the_middle(
    in_buffers: bool, bench: Bench, checkpoints: Checkpoints
) -> None:
    if bench.backend == "nccl":
        pytest.skip("a server that waits for a NCCL peer in vain is killed: see test_sglang_servers")
    tensors = tensors_of(checkpoints(seed=1), bench.device)
    manifest = Learner.manifest(tensors)

    def half() -> Iterator[tuple[str, Tensor]]:
        yield from sent[: len(sent) // 2]
        raise MemoryError("on purpose")

    async def test() -> None:
        engine = bench.make(checkpoints(), weights=OLD, slots=2, max_context=64)
        buffer_bytes = SMALL_BUFFER_BYTES if in_buffers else 0
        async with serving(engine):
            async with Learner.joined_by(engine) as learner:
                receiving = engine.receive_weights(manifest, NEW, buffer_bytes=buffer_bytes)
                outcomes = await asyncio.gather(
                    asyncio.to_thread(learner.group.send, half()), receiving, return_exceptions=True
                )
            assert isinstance(outcomes[0], MemoryError)
            assert isinstance(outcomes[1], EngineError | WeightGroupError)
            async with Learner.joined_by(engine, 2) as learner:
                await learner.broadcast(engine, tensors, NEW, buffer_bytes)
            answer = await engine.generate(ask(prompt(4), 8))
        expected = answer_logprobs(load_model(checkpoints(seed=1)), prompt(4), answer.output_ids)
        close_to(bench, answer.logprobs, expected)

    sent = side_by_side(manifest, tensors, SMALL_BUFFER_BYTES) if in_buffers else list(tensors.items())
    run(test())


def test_weights_need_a_group_and_a_later_group_replaces_the_one_before(bench: Bench, checkpoints: Checkpoints) -> None:
    tensors = tensors_of(checkpoints(seed=1), bench.device)

    async def test() -> None:
        async with serving(bench.make(checkpoints(), weights=OLD, slots=2, max_context=64)) as engine:
            with pytest.raises(EngineError, match="no weight group"):
                await engine.receive_weights(Learner.manifest(tensors), NEW)
            for epoch in (1, 2, 3):
                weights = NEW._replace(version=3 + epoch)
                async with Learner.joined_by(engine, epoch, bench.backend) as learner:
                    for _ in range(epoch):
                        await learner.broadcast(engine, tensors, weights)
                assert (await engine.status()).weights == weights
            assert (await engine.generate(ask(prompt(4), 8))).spans == (VersionSpan(0, weights),)

    run(test())


# --------------------------------------------------------------------------------------------------------- the end


def test_close_ends_open_requests_and_refuses_later_ones(bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        engine = bench.make(checkpoints(), engine_id="east-3", weights=OLD, slots=1, max_context=CONTEXT)
        async with serving(engine):
            requests = [asyncio.ensure_future(engine.generate(ask(prompt(4), 8000))) for _ in range(3)]
            await eventually(engine, lambda s: (s.running_requests, s.waiting_requests) == (1, 2))
        for outcome in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(outcome, EngineError)
            assert "east-3 was closed" in str(outcome)
        for call in (engine.generate(ask(prompt(4))), engine.pause(PauseMode.ABORT), engine.status()):
            with pytest.raises(EngineError, match="east-3"):
                await call
        await engine.close()  # once more does no harm

    run(test())


def test_an_engine_that_was_not_started_says_so(bench: Bench, checkpoints: Checkpoints) -> None:
    async def test() -> None:
        engine = bench.make(checkpoints(), weights=OLD, slots=1, max_context=64)
        with pytest.raises(EngineError, match="start it first"):
            await engine.generate(ask(prompt(4)))
        await engine.close()

    run(test())


def test_a_checkpoint_without_weights_fails_the_start_by_the_files_name(
    bench: Bench, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((checkpoints() / "config.json").read_text())

    async def test() -> None:
        engine = bench.make(tmp_path, weights=OLD, slots=1, max_context=64)
        with pytest.raises(EngineError, match=r"model\.safetensors does not exist"):
            await engine.start()
        with pytest.raises(EngineError):
            await engine.generate(ask(prompt(4)))
        await engine.close()

    run(test())
