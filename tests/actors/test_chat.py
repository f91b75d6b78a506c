"""The OpenAI-compatible endpoint with the real client: what agents see is text, what is trained is what was sampled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest

from slime_async.actors.chat import AgentEpisode, ChatServer, ChatSession
from slime_async.actors.chat.messages import signature
from slime_async.actors.chat.template import ChatTemplate
from slime_async.actors.chat.tools import parse_answer, parse_tagged
from slime_async.actors.engine import EngineError, Generation, SamplingParams
from slime_async.actors.environment import Task
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.branches import branches
from slime_async.demo.chat import END, make_tokenizer
from slime_async.trajectory import TaskRef, Trajectory
from tests.actors.agents import TOOLS
from tests.actors.scripted import Answer, ScriptedEngine, answer

CHAT = make_tokenizer()
END_ID = CHAT.get_vocab()[END]
SAMPLING = SamplingParams(max_new_tokens=200, stop_token_ids=(END_ID,))
REF = TaskRef(0, "s", 0)
DEADLINE_S = 60.0


def letters(text: str) -> list[int]:
    """One token per byte, as an engine may well sample it, and as the tokenizer would not write it."""
    return [token for character in text for token in CHAT.encode(character)]


def says(text: str, *, versions: dict[int, int] | None = None, reason: str = "stop") -> Generation:
    ids = [*letters(text), *([END_ID] if reason == "stop" else [])]
    return answer(ids, versions=versions, reason=reason)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await work()

    asyncio.run(bounded())


def make_task(content: Any = None, **fields: Any) -> Task:
    return Task(REF, 0, content, SAMPLING, CHAT, **fields)


@asynccontextmanager
async def endpoint(script: list[Answer], **limits: Any) -> AsyncIterator[tuple[Any, ChatSession, ScriptedEngine]]:
    """A client, its episode's session and the engine behind them."""
    engine = ScriptedEngine(script)
    policy = EnginePolicy(engine, SAMPLING, EpisodeLimits(**{"max_context_tokens": 4096, **limits}), seed=0)
    server = ChatServer()
    try:
        async with (
            server.session(make_task(), policy) as session,
            openai.AsyncOpenAI(base_url=session.base_url, api_key="unused") as client,
        ):
            yield client, session, engine
    finally:
        await server.close()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def finished(session: ChatSession, reward: float = 1.0) -> Trajectory:
    return session.finish(reward).to_trajectory(REF, 0, 0)


def trained(trajectory: Trajectory) -> list[int]:
    return trajectory.token_ids[trajectory.loss_mask == 1].tolist()


def test_a_conversation_that_goes_on_keeps_the_tokens_that_were_sampled() -> None:
    async def test() -> None:
        first, second = says("the answer is 12", versions={0: 3, 4: 4}), says("yes, 12")
        assert CHAT.encode("the answer is 12") != letters("the answer is 12"), "the tokenizer would spell it otherwise"
        async with endpoint([first, second]) as (client, session, engine):
            messages: list[Any] = [user("6 + 6?")]
            reply = await client.chat.completions.create(model="m", messages=messages)
            assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("the answer is 12", "stop")
            assert reply.usage.completion_tokens == len(first.output_ids)
            messages += [reply.choices[0].message, user("sure?")]
            await client.chat.completions.create(model="m", messages=messages)
            trajectory = finished(session)
        assert (
            list(engine.requests[1].prompt_ids[: len(engine.requests[0].prompt_ids)]) == engine.requests[0].prompt_ids
        )
        assert len(branches(trajectory)) == 1
        assert trained(trajectory) == first.output_ids + second.output_ids
        assert CHAT.decode(trajectory.token_ids) == (
            "<|im_start|>user\n6 + 6?<|im_end|>\n<|im_start|>assistant\nthe answer is 12<|im_end|>\n"
            "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes, 12<|im_end|>"
        )
        sampled = trajectory.loss_mask == 1
        assert trajectory.behavior_logprobs[sampled].tolist() == first.logprobs + second.logprobs
        assert trajectory.token_versions()[sampled].tolist()[:6] == [3, 3, 3, 3, 4, 4]

    run(test)


def test_an_answer_that_was_cut_is_closed_as_the_template_closes_answers() -> None:
    async def test() -> None:
        async with endpoint([says("so far", reason="length"), says("done")]) as (client, session, _):
            reply = await client.chat.completions.create(model="m", messages=[user("go")], max_tokens=6)
            assert reply.choices[0].finish_reason == "length"
            messages = [user("go"), {"role": "assistant", "content": "so far"}, user("on")]
            await client.chat.completions.create(model="m", messages=messages)
            trajectory = finished(session)
        assert CHAT.decode(trajectory.token_ids).count("so far<|im_end|>\n<|im_start|>user\non") == 1
        assert trained(trajectory) == [*letters("so far"), *letters("done"), END_ID]

    run(test)


def test_reasoning_that_the_template_drops_from_history_stays_in_what_is_trained() -> None:
    async def test() -> None:
        async with endpoint([says("<think>hm</think>\n\nfour"), says("five")]) as (client, session, _):
            reply = await client.chat.completions.create(model="m", messages=[user("2+2")])
            message = reply.choices[0].message
            assert (message.content, message.reasoning_content) == ("four", "hm")
            messages = [user("2+2"), {"role": "assistant", "content": "four"}, user("2+3")]
            await client.chat.completions.create(model="m", messages=messages)
            trajectory = finished(session)
        assert len(branches(trajectory)) == 1
        assert "<think>hm</think>\n\nfour<|im_end|>\n<|im_start|>user\n2+3" in CHAT.decode(trajectory.token_ids)

    run(test)


def test_a_history_that_the_client_rewrote_begins_a_branch() -> None:
    async def test() -> None:
        async with endpoint([says("one"), says("two"), says("three")]) as (client, session, _):
            await client.chat.completions.create(model="m", messages=[user("a")])
            rewritten = [user("a"), {"role": "assistant", "content": "summary"}, user("b")]
            await client.chat.completions.create(model="m", messages=rewritten)
            goes_on = [*rewritten, {"role": "assistant", "content": "two"}, user("c")]
            await client.chat.completions.create(model="m", messages=goes_on)
            trajectory = finished(session)
        texts = [CHAT.decode(trajectory.token_ids[b.tokens]) for b in branches(trajectory)]
        assert len(texts) == 2
        assert texts[0].endswith("assistant\none<|im_end|>")
        assert "summary" in texts[1]
        assert texts[1].endswith("three<|im_end|>")
        assert trained(trajectory) == says("one").output_ids + says("two").output_ids + says("three").output_ids

    run(test)


def test_several_choices_are_branches_and_any_of_them_goes_on() -> None:
    async def test() -> None:
        async with endpoint([says("x"), says("y"), says("z")]) as (client, session, _):
            reply = await client.chat.completions.create(model="m", messages=[user("a")], n=2)
            assert [choice.message.content for choice in reply.choices] == ["x", "y"]
            await client.chat.completions.create(model="m", messages=[user("a"), reply.choices[1].message, user("b")])
            trajectory = finished(session)
        texts = [CHAT.decode(trajectory.token_ids[b.tokens]).split("assistant\n", 1)[1] for b in branches(trajectory)]
        assert texts[0] == "x<|im_end|>"
        assert texts[1].startswith("y<|im_end|>\n<|im_start|>user\nb")
        assert len(trained(trajectory)) == 6

    run(test)


def test_a_stream_says_the_same_as_a_whole_answer() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'

    async def test() -> None:
        text = "a long answer, in several chunks"
        async with endpoint([says(text), says(call)]) as (client, _, _):
            stream = await client.chat.completions.create(
                model="m", messages=[user("a")], stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
            assert "".join(pieces) == text
            assert len([piece for piece in pieces if piece]) == 2
            assert chunks[-1].usage.completion_tokens == len(letters(text)) + 1
            stream = await client.chat.completions.create(model="m", messages=[user("b")], tools=TOOLS, stream=True)
            deltas = [chunk.choices[0] async for chunk in stream]
        calls = [delta.delta.tool_calls[0] for delta in deltas if delta.delta.tool_calls]
        assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [(0, "add", '{"a": 1, "b": 2}')]
        assert deltas[-1].finish_reason == "tool_calls"

    run(test)


def test_logprobs_are_those_of_the_sampled_tokens() -> None:
    async def test() -> None:
        async with endpoint([says("ab")]) as (client, _, _):
            reply = await client.chat.completions.create(model="m", messages=[user("a")], logprobs=True)
            content = reply.choices[0].logprobs.content
            assert [(c.token, c.logprob) for c in content] == [("a", -1 / 8), ("b", -2 / 8), (END, -3 / 8)]
            assert [model.id async for model in client.models.list()] == ["policy"]

    run(test)


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({"stop": ["\n"]}, "stop = .* is not supported here"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"best_of": 3}}, "unknown fields best_of"),
        ({"messages": []}, "at least one message"),
        ({"n": 1000}, "at most 64"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ],
)
def test_what_is_not_supported_is_refused_once_and_by_name(request_fields: dict[str, Any], message: str) -> None:
    async def test() -> None:
        async with endpoint([says("x")]) as (client, _, engine):
            with pytest.raises(openai.BadRequestError, match=message):
                await client.chat.completions.create(**{"model": "m", "messages": [user("a")], **request_fields})
            assert engine.requests == []

    run(test)


def test_the_runs_own_sampling_counts_and_a_client_may_only_ask_for_less() -> None:
    async def test() -> None:
        async with endpoint([says("x")]) as (client, _, engine):
            for limit in (5, 5000):
                await client.chat.completions.create(
                    model="m", messages=[user(str(limit))], temperature=0.1, top_p=0.5, max_completion_tokens=limit
                )
        assert [request.sampling.max_new_tokens for request in engine.requests] == [5, 200]
        assert {request.sampling.temperature for request in engine.requests} == {1.0}

    run(test)


def test_a_limit_of_the_episode_is_a_refusal_that_clients_do_not_repeat() -> None:
    async def test() -> None:
        async with endpoint([says("x")], max_context_tokens=40) as (client, session, engine):
            await client.chat.completions.create(model="m", messages=[user("a")])
            with pytest.raises(openai.BadRequestError) as refusal:
                await client.chat.completions.create(model="m", messages=[user("a" * 100)])
            assert refusal.value.code == "context_length_exceeded"
            assert finished(session).finish_reason == "context_full"
            assert len(engine.requests) == 1

    run(test)


def dies(request: Any) -> Generation:
    raise EngineError("engine e0 died")


def test_a_dead_engine_fails_the_episode_whatever_the_agent_makes_of_it() -> None:
    async def test() -> None:
        async with endpoint([says("x"), dies]) as (client, session, engine):
            await client.chat.completions.create(model="m", messages=[user("a")])
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model="m", messages=[user("b")])
            assert len(engine.requests) == 2, "the client does not repeat it"
            with pytest.raises(EngineError, match="e0 died"):
                session.finish(1.0)

    run(test)


def test_an_episode_that_is_over_answers_no_more() -> None:
    async def test() -> None:
        server = ChatServer()
        policy = EnginePolicy(ScriptedEngine([says("x")]), SAMPLING, EpisodeLimits(4096), seed=0)
        try:
            async with server.session(make_task(), policy) as session:
                url = session.base_url
            async with openai.AsyncOpenAI(base_url=url, api_key="unused") as client:
                with pytest.raises(openai.NotFoundError, match="this episode is over"):
                    await client.chat.completions.create(model="m", messages=[user("a")])
        finally:
            await server.close()

    run(test)


# --------------------------------------------------------------------------------------------------- whole agents


def play(agent: str, script: list[Answer], content: Any, **fields: Any) -> Trajectory:
    async def play_once() -> Trajectory:
        episode = AgentEpisode(f"tests.actors.agents:{agent}")
        policy = EnginePolicy(ScriptedEngine(script), SAMPLING, EpisodeLimits(fields.pop("context", 4096)), seed=0)
        try:
            async with asyncio.timeout(DEADLINE_S):
                return (await episode.generate(make_task(content, **fields), policy)).to_trajectory(REF, 0, 0)
        finally:
            await episode.close()

    return asyncio.run(play_once())


def exact(content: Any, text: str, finish_reason: str) -> float:
    return float(text == content["a"])


def test_a_tool_using_agent_is_one_branch_with_the_tools_answers_untrained() -> None:
    call = 'adding <tool_call>{"name": "add", "arguments": {"a": 5, "b": 7}}</tool_call>'
    trajectory = play("solve", [says(call), says("12")], {"q": "5 + 7", "a": "12"}, reward=exact)
    assert trajectory.reward == 1.0
    assert len(branches(trajectory)) == 1
    assert trained(trajectory) == [*letters(call), END_ID, *letters("12"), END_ID]
    given = CHAT.decode(trajectory.token_ids[trajectory.loss_mask == 0])
    assert "<tool_response>\n12\n</tool_response>" in given
    assert '"name": "add", "description": "Add two numbers"' in given


def test_a_plain_agent_runs_in_a_thread_and_may_reward_itself() -> None:
    assert play("solve_in_a_thread", [says("four")], {"q": "2 + 2", "a": "four"}).reward == 1.0


def test_an_agent_that_a_limit_stops_has_played_a_truncated_episode() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 5, "b": 7}}</tool_call>'
    room = len(ChatTemplate(CHAT, [END_ID]).begin([{"role": "system", "content": "Use the tool."}, user("?")], TOOLS))
    trajectory = play("solve", [says(call)], {"q": "?", "a": ""}, reward=exact, context=room + len(letters(call)) + 5)
    assert (trajectory.finish_reason, trajectory.reward) == ("context_full", 0.0)


def test_an_agent_that_returns_neither_text_nor_number_fails() -> None:
    with pytest.raises(TypeError, match="returned a NoneType"):
        play("gives_nothing", [says("x")], {})


# ---------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        (
            {"role": "assistant", "content": " a "},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            True,
        ),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": "", "refusal": None}, True),
        ({"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}, False),
        ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "a."}, False),
    ],
)
def test_messages_are_the_same_by_what_they_say(ours: Any, theirs: Any, same: bool) -> None:
    assert (signature(ours) == signature(theirs)) is same


def test_calls_are_the_same_whatever_their_ids_and_their_spacing() -> None:
    def calling(identity: str, arguments: str) -> dict[str, Any]:
        call = {"id": identity, "type": "function", "function": {"name": "add", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    assert signature(calling("1", '{"a": 1}')) == signature(calling("2", '{"a":1}'))
    assert signature(calling("1", '{"a": 1}')) != signature(calling("1", '{"a": 2}'))


@pytest.mark.parametrize(
    "text", ["<tool_call>{broken</tool_call>", '<tool_call>{"arguments": {}}</tool_call>', "plain"]
)
def test_a_call_that_cannot_be_read_stays_in_the_text(text: str) -> None:
    parsed = parse_answer(text, parse_tagged)
    assert (parsed.content, parsed.calls) == (text, ())


def test_without_tools_in_the_request_nothing_is_a_call() -> None:
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parse_answer(text, None).content == text
    assert [call.name for call in parse_answer(text, parse_tagged).calls] == ["add"]


def test_a_tokenizer_without_a_chat_template_is_refused_with_what_to_do() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: add"):
        ChatSession(replace(make_task(), tokenizer=bare), None)  # type: ignore[arg-type]
