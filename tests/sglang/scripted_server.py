"""A web server that answers as a test tells it to, and an SGLang engine that talks to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from slime_async.actors.engine import GenerateRequest, SamplingParams
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.trajectory import WeightId

DEADLINE_S = 20.0
OLD, NEW = WeightId(1, 3), WeightId(1, 4)
Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers ``/generate`` with ``events``, each after ``step`` is set free once; everything else with ``ok``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.keys: dict[str, str] = {}
        self.connections: list[Any] = []
        """Where each call came from"""
        self.events: list[dict[str, Any] | str] = []
        self.answers: dict[str, Respond] = {}
        self.version = "0.5.23"
        self.arguments: dict[str, Any] = {}
        self.url = ""

    async def respond(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        self.calls.append((request.path, body))
        self.connections.append(request.transport and request.transport.get_extra_info("peername"))
        self.keys[request.path] = request.headers.get("Authorization", "")
        if request.path in self.answers:
            return await self.answers[request.path](request)
        if request.path == "/server_info":
            known = {"version": self.version, "tp_size": 2, "disable_overlap_schedule": True}
            return web.json_response({**known, **self.arguments})
        if request.path == "/generate":
            return await self.stream(request)
        return web.json_response({"success": True, "message": "ok"})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """What ``/generate`` answers."""
        response = web.StreamResponse()
        await response.prepare(request)
        for event in self.events:
            text = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            for i in range(0, len(text), 50_000):  # events are cut anywhere
                await response.write(text[i : i + 50_000].encode())
        return response

    def answer_once_cut(self) -> asyncio.Event:
        """``/generate`` answers once an abort has come, or the event is set by the test."""
        cut = asyncio.Event()

        async def generate(request: web.Request) -> web.StreamResponse:
            await cut.wait()
            return await self.stream(request)

        async def abort(_: web.Request) -> web.StreamResponse:
            cut.set()
            return web.json_response({})

        self.answers |= {"/generate": generate, "/abort_request": abort}
        return cut

    def asked(self) -> list[str]:
        """The ids of the requests that came, in order; several may have come in one call."""
        ids = [body["rid"] for path, body in self.calls if path == "/generate"]
        return [one for some in ids for one in (some if isinstance(some, list) else [some])]

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls if path not in ("/ready", "/server_info")]


@asynccontextmanager
async def serving(checkpoint: Path, **options: Any) -> AsyncIterator[tuple[Server, SGLangEngine]]:
    server = Server()
    server.version = options.pop("version", server.version)
    server.arguments = options.pop("arguments", {})
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", server.respond)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    engine = SGLangEngine(checkpoint, engine_id="e", url=server.url, **{"weights": OLD, **options})
    try:
        await engine.start()
        yield server, engine
    finally:
        await engine.close()
        await runner.cleanup()


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test

    asyncio.run(bounded())


async def settled(turns: int = 5) -> None:
    """Whatever can go on without a clock or a socket has done so."""
    for _ in range(turns):
        await asyncio.sleep(0)


def event(ids: list[int], count: int, reason: str | None = None, **meta: Any) -> dict[str, Any]:
    """A chunk whose ids come from position ``count - len(ids)``; log-probs are the ids' negatives."""
    pairs = [[-float(i), i, None] for i in ids]
    finish = None if reason is None else {"type": reason}
    fields = {"completion_tokens": count, "finish_reason": finish, "weight_version": "1.3", **meta}
    return {"output_ids": ids, "meta_info": {**fields, "output_token_logprobs": pairs}}


def ask(**sampling: Any) -> GenerateRequest:
    return GenerateRequest("0123", [1, 2, 3], SamplingParams(8, **sampling))
