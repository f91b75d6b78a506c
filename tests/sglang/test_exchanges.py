"""Requests that go to a server together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from slime_async.actors.engine import EngineError, Generation
from slime_async.actors.sglang.client import EngineRefused
from slime_async.actors.sglang.exchanges import MOST_TOGETHER, Body, Event, Exchanges, together
from tests.sglang.scripted_server import ask, event, run, serving, settled

FINISHED = "stop"


class Posts:
    """What a server is sent, and the events that a test lets it answer with."""

    def __init__(self) -> None:
        self.bodies: list[Body] = []
        self.events: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        """None ends the stream"""
        self.ended = 0

    async def post(self, body: Body) -> AsyncGenerator[Event, None]:
        self.bodies.append(body)
        try:
            while (next_one := await self.events.get()) is not None:
                if isinstance(next_one, Exception):
                    raise next_one
                yield next_one
        finally:
            self.ended += 1

    def say(self, index: int, token: int, count: int = 1, reason: str | None = None) -> None:
        self.events.put_nowait({**event([token], count, reason), "index": index})


def body_of(rid: str) -> Body:
    return {"rid": rid, "input_ids": [1, 2], "sampling_params": {"n": rid}, "extra_key": "v1", "return_logprob": True}


async def all_of(exchanges: Exchanges, rid: str) -> list[int]:
    """The tokens of one answer."""
    tokens = []
    async with aclosing(exchanges.ask(body_of(rid))) as events:
        async for piece in events:
            tokens += piece["output_ids"]
            if piece["meta_info"]["finish_reason"] is not None:
                break
    return tokens


def asking(test: Callable[[Posts, Exchanges], Coroutine[Any, Any, None]]) -> None:
    async def with_exchanges() -> None:
        posts = Posts()
        exchanges = Exchanges("engine e", posts.post)
        try:
            await test(posts, exchanges)
        finally:
            await exchanges.close()

    run(with_exchanges())


def test_what_is_asked_in_one_turn_is_one_exchange_and_each_gets_its_own_answer() -> None:
    async def test(posts: Posts, exchanges: Exchanges) -> None:
        asked = [asyncio.create_task(all_of(exchanges, rid)) for rid in "abc"]
        await settled()
        [body] = posts.bodies
        assert body == {
            "rid": ["a", "b", "c"],
            "input_ids": [[1, 2]] * 3,
            "sampling_params": [{"n": "a"}, {"n": "b"}, {"n": "c"}],
            "extra_key": ["v1"] * 3,
            "return_logprob": True,
        }
        posts.say(2, 30)
        posts.say(0, 10, reason=FINISHED)
        posts.say(2, 31, 2, FINISHED)
        assert (await asked[0], await asked[2]) == ([10], [30, 31])
        assert not asked[1].done()
        posts.say(1, 20, reason=FINISHED)
        assert await asked[1] == [20]
        await settled()
        assert posts.ended == 1

    asking(test)


def test_a_request_alone_goes_as_it_is() -> None:
    assert together([body_of("a")]) == body_of("a")


def test_no_exchange_is_larger_than_what_the_server_handles_well() -> None:
    async def test(posts: Posts, exchanges: Exchanges) -> None:
        asked = [asyncio.create_task(all_of(exchanges, str(i))) for i in range(MOST_TOGETHER + 1)]
        await settled()
        assert [len(body["rid"]) for body in posts.bodies] == [MOST_TOGETHER, len(str(MOST_TOGETHER))]
        assert posts.bodies[1]["rid"] == str(MOST_TOGETHER)
        for task in asked:
            task.cancel()

    asking(test)


def test_who_leaves_does_not_end_the_others_answers_and_the_last_one_ends_the_exchange() -> None:
    async def test(posts: Posts, exchanges: Exchanges) -> None:
        first, second = (asyncio.create_task(all_of(exchanges, rid)) for rid in "ab")
        await settled()
        first.cancel()
        await settled()
        posts.say(0, 10)
        posts.say(1, 20)
        await settled()
        assert (second.done(), posts.ended) == (False, 0)
        second.cancel()
        await settled()
        assert posts.ended == 1

    asking(test)


@pytest.mark.parametrize(
    ("breaks", "kind", "message"),
    [
        (EngineRefused("engine e: /generate: too long"), EngineRefused, "engine e: /generate: too long"),
        (None, EngineError, "engine e: the stream of b ended before its answer did"),
        (ValueError("Expecting value"), EngineError, "engine e: /generate: ValueError: Expecting value"),
    ],
)
def test_what_breaks_an_exchange_is_told_to_all_whose_answers_are_not_complete(
    breaks: Exception | None, kind: type[EngineError], message: str
) -> None:
    async def test(posts: Posts, exchanges: Exchanges) -> None:
        complete, broken = (asyncio.create_task(all_of(exchanges, rid)) for rid in "ab")
        await settled()
        posts.say(0, 10, reason=FINISHED)
        posts.say(1, 20)
        posts.events.put_nowait(breaks)
        assert await complete == [10]
        with pytest.raises(kind, match=message):
            await broken

    asking(test)


def test_an_answer_to_nobody_breaks_the_exchange() -> None:
    async def test(posts: Posts, exchanges: Exchanges) -> None:
        asked = asyncio.create_task(all_of(exchanges, "a"))
        await settled()
        posts.say(7, 10)
        with pytest.raises(EngineError, match="IndexError"):
            await asked

    asking(test)


@pytest.mark.parametrize("turns", [2, 5])
def test_closing_ends_what_is_asked_be_it_sent_or_not(turns: int) -> None:
    async def test(posts: Posts, exchanges: Exchanges) -> None:
        asked = asyncio.create_task(all_of(exchanges, "a"))
        await settled(turns)
        await exchanges.close()
        with pytest.raises(EngineError, match="ended before its answer did"):
            await asked
        assert posts.ended == len(posts.bodies) == (turns > 2)

    asking(test)


def test_a_bunch_is_one_call_of_the_server(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint) as (server, engine):

            async def answer_in_turns(request: web.Request) -> web.StreamResponse:
                reversed_ids = (await request.json())["rid"][::-1]
                server.events = [
                    {**event([int(rid)], 1, "stop"), "index": len(reversed_ids) - 1 - i}
                    for i, rid in enumerate(reversed_ids)
                ]
                return await server.stream(request)

            server.answers["/generate"] = answer_in_turns
            requests = [replace(ask(), request_id=str(i)) for i in range(3)]
            answers: list[Generation] = await asyncio.gather(*map(engine.generate, requests))
            assert [answer.output_ids for answer in answers] == [[0], [1], [2]]
            assert server.paths().count("/generate") == 1

    run(test())
