"""Requests of one turn of the event loop go to the server in one HTTP exchange; their answers come back on one stream.

::

    ask ─┐                              ┌─ pieces of the first answer
    ask ─┼─► end of the turn ─► POST ───┼─ pieces of the second
    ask ─┘                              └─ …

A request of its own costs the server's web process a millisecond or two: a bunch that entered together would arrive
piece by piece, with a prefill for each. Consumes bodies of ``/generate``; waits for the server's events, beside whoever
watches the server (``SGLangEngine.check_health``). When the exchange breaks, every answer in it that is not complete
raises, and so does what the server refuses: of one request, it refuses the exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from slime_async.actors.engine import EngineError

MOST_TOGETHER = 32
"""Requests in one exchange. More save the server little, and the more there are, the more each piece costs it"""
OF_EACH = ("rid", "input_ids", "sampling_params", "extra_key")
"""Fields that are lists where there are several requests; the others are the engine's, and alike"""

Body = Mapping[str, Any]
Event = dict[str, Any]
Post = Callable[[Body], AsyncGenerator[Event, None]]


@dataclass(slots=True, eq=False)
class _Asked:
    """One request."""

    body: Body
    pieces: asyncio.Queue[Event | EngineError] = field(default_factory=asyncio.Queue)
    over: bool = False
    """Its answer is complete, or nobody waits for it any more"""
    exchange: _Exchange | None = None


class Exchanges:
    """Of one server. ``post`` sends a body and gives the events that come back. Use it from one event loop."""

    def __init__(self, name: str, post: Post) -> None:
        self._name = name
        """Whose errors these are"""
        self._post = post
        self._asked: list[_Asked] = []
        """In this turn"""
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, body: Body) -> AsyncGenerator[Event, None]:
        """The events of one answer. An exchange that everybody has left is given up; else the server goes on with what
        was asked until its ``rid`` is aborted."""
        asked = _Asked(body)
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._send)
        self._asked.append(asked)
        try:
            while True:
                piece = await asked.pieces.get()
                if isinstance(piece, EngineError):
                    raise piece
                yield piece
        finally:
            if asked.exchange is not None:
                asked.exchange.leave(asked)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _send(self) -> None:
        asked, self._asked = self._asked, []
        for first in range(0, len(asked), MOST_TOGETHER):
            exchange = _Exchange(self._name, asked[first : first + MOST_TOGETHER])
            exchange.task = asyncio.create_task(exchange.run(self._post), name="exchange with SGLang")
            self._tasks.add(exchange.task)
            exchange.task.add_done_callback(self._tasks.discard)
            exchange.task.add_done_callback(exchange.tell)


class _Exchange:
    """One call of ``/generate``."""

    task: asyncio.Task[None]

    def __init__(self, name: str, asked: Sequence[_Asked]) -> None:
        self._name = name
        self._asked = asked
        for one in asked:
            one.exchange = self

    def leave(self, asked: _Asked) -> None:
        """Nobody waits for this answer any more."""
        asked.over = True
        if self._is_over:
            self.task.cancel()

    async def run(self, post: Post) -> None:
        """Hands on what comes, until every answer is over."""
        async with aclosing(post(together([one.body for one in self._asked]))) as events:
            async for event in events:
                one = self._asked[event.get("index", 0)]
                one.pieces.put_nowait(event)
                if event["meta_info"]["finish_reason"] is not None:
                    one.over = True
                    if self._is_over:
                        return

    def tell(self, task: asyncio.Task[None]) -> None:
        """``run`` ended: whoever still waits hears why."""
        error = None if task.cancelled() else task.exception()
        for one in self._asked:
            if not one.over:
                one.pieces.put_nowait(self._broken(one, error))

    def _broken(self, asked: _Asked, error: BaseException | None) -> EngineError:
        if error is None:
            return EngineError(f"{self._name}: the stream of {asked.body['rid']} ended before its answer did")
        if isinstance(error, EngineError):
            return type(error)(str(error))
        return EngineError(f"{self._name}: /generate: {type(error).__name__}: {error}")

    @property
    def _is_over(self) -> bool:
        return all(one.over for one in self._asked)


def together(bodies: Sequence[Body]) -> Body:
    """One body for all."""
    first, *others = bodies
    return {**first, **({name: [body[name] for body in bodies] for name in OF_EACH} if others else {})}
