"""The policy client: seeds, sessions, room, and answers that an abort cut into pieces."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from slime_async.actors.engine import GenerateRequest, Generation
from slime_async.actors.environment import ContextFullError
from slime_async.actors.policy import derive_seed
from slime_async.trajectory import VersionSpan
from tests.actors.scripted import EOS_ID, SAMPLING, ScriptedEngine, answer, make_policy, weights


def test_an_aborted_answer_goes_on_from_its_last_token() -> None:
    engine = ScriptedEngine(
        [
            answer([1, 2, 3], versions={0: 4, 2: 5}, reason="abort"),
            answer([], reason="abort"),
            answer([4, EOS_ID], versions={0: 5, 1: 6}),
        ]
    )
    policy = make_policy(engine)
    turn = asyncio.run(policy.sample([10, 11]))

    assert list(turn.prompt_ids) == [10, 11]
    assert turn.output_ids == [1, 2, 3, 4, EOS_ID]
    assert list(turn.logprobs) == [-1 / 8, -2 / 8, -3 / 8, -1 / 8, -2 / 8]
    assert turn.spans == (VersionSpan(0, weights(4)), VersionSpan(2, weights(5)), VersionSpan(4, weights(6)))
    assert turn.finish_reason == "stop"
    assert policy.resubmissions == 2
    assert [list(request.prompt_ids) for request in engine.requests] == [[10, 11], [10, 11, 1, 2, 3], [10, 11, 1, 2, 3]]
    assert [request.resumed_tokens for request in engine.requests] == [0, 3, 3]
    assert [request.sampling.max_new_tokens for request in engine.requests] == [7, 4, 4]
    assert len({request.sampling.seed for request in engine.requests}) == 1, "positions of one seed go on"
    assert len({request.request_id for request in engine.requests}) == 3


def test_an_answer_aborted_at_its_length_limit_is_complete() -> None:
    engine = ScriptedEngine([answer(range(7), reason="abort")])
    turn = asyncio.run(make_policy(engine).sample([10]))
    assert (turn.finish_reason, len(engine.requests)) == ("length", 1)


def test_an_answer_cut_anywhere_equals_the_uncut_one() -> None:
    whole = [3, 1, 4, 1, 5, EOS_ID]

    def from_position(request: GenerateRequest, stop_after: int) -> Generation:
        rest = whole[request.resumed_tokens :]
        return answer(rest[:stop_after], reason="abort") if stop_after < len(rest) else answer(rest)

    for cut in range(1, len(whole) + 1):
        engine = ScriptedEngine([lambda request, cut=cut: from_position(request, cut)])
        assert asyncio.run(make_policy(engine).sample([0])).output_ids == whole


def test_turns_share_a_session_and_have_seeds_of_their_own() -> None:
    async def two_turns(engine: ScriptedEngine, seed: int) -> None:
        policy = make_policy(engine, seed=seed)
        await policy.sample([1])
        await policy.sample([1])

    first, again, other = (ScriptedEngine([answer([EOS_ID])]) for _ in range(3))
    for engine, seed in ((first, 5), (again, 5), (other, 6)):
        asyncio.run(two_turns(engine, seed))

    def seeds(engine: ScriptedEngine) -> list[int | None]:
        return [request.sampling.seed for request in engine.requests]

    assert seeds(first) == seeds(again)
    assert len({*seeds(first), *seeds(other)}) == 4
    assert len({request.session for request in first.requests}) == 1
    assert first.requests[0].session != again.requests[0].session


def test_a_turns_own_sampling_parameters_replace_the_runs() -> None:
    engine = ScriptedEngine([answer([EOS_ID])])
    own = replace(SAMPLING, temperature=0.0, max_new_tokens=2, seed=77)
    asyncio.run(make_policy(engine).sample([1], own))
    assert engine.requests[0].sampling == own


def test_an_answer_may_not_grow_beyond_the_context() -> None:
    engine = ScriptedEngine([answer([EOS_ID])])
    policy = make_policy(engine, max_context_tokens=10)
    asyncio.run(policy.sample([1] * 8))
    assert engine.requests[0].sampling.max_new_tokens == 2
    assert [policy.room([1] * n) for n in (8, 10, 12)] == [2, 0, 0]
    with pytest.raises(ContextFullError, match=r"10 tokens leaves no room within sampling.max_context_tokens = 10"):
        asyncio.run(policy.sample([1] * 10))


def test_seeds_fit_a_signed_64_bit_integer_and_depend_on_every_part() -> None:
    seeds = {derive_seed(*key) for key in [(1, 2), (12,), (2, 1), ("1", "2", ""), (1, 2, 3)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
