"""The HTTP side: one server per actor on loopback, one secret path per episode."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from slime_async.actors.chat import response
from slime_async.actors.chat.request import RequestError, read_request
from slime_async.actors.chat.session import ChatSession
from slime_async.actors.chat.tools import ToolParser, parse_tagged
from slime_async.actors.environment import EpisodeTruncated, Policy, Task

if TYPE_CHECKING:
    from aiohttp import web

MODEL = "policy"
"""The name under which the policy is listed; requests may name any"""
MAX_BODY_BYTES = 64 << 20
DO_NOT_RETRY = {"x-should-retry": "false"}
"""The openai client repeats failed requests by itself: the same would happen again, and its turn be sampled twice"""


class ChatServer:
    """Started with the first episode. Listens on loopback only: what it serves is this process's policy."""

    def __init__(self) -> None:
        self._sessions: dict[str, ChatSession] = {}
        self._runner: web.AppRunner | None = None
        self._url = ""

    async def start(self) -> None:
        """Raises ``ValueError`` when aiohttp is not installed."""
        if self._runner is not None:
            return
        try:
            from aiohttp import web
        except ModuleNotFoundError as missing:
            raise ValueError("the chat endpoint needs aiohttp: pip install 'slime-async[agents]'") from missing
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/{session}/v1/chat/completions", self._complete)
        app.router.add_get("/{session}/v1/models", self._models)
        # a client that goes away cancels its request: nobody would see the answer, and it would be trained
        self._runner = runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self._url = f"http://{host}:{port}"

    @contextlib.asynccontextmanager
    async def session(
        self, task: Task, policy: Policy, parser: ToolParser = parse_tagged
    ) -> AsyncIterator[ChatSession]:
        """One episode's endpoint; once the block has ended, its requests are cancelled and its path answers 404."""
        await self.start()
        session = ChatSession(task, policy, parser)
        session.base_url = f"{self._url}/{session.key}/v1"
        self._sessions[session.key] = session
        try:
            yield session
        finally:
            del self._sessions[session.key]
            await session.close()

    async def close(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        if request.match_info["session"] not in self._sessions:
            return _refuse(404, "this episode is over", "not_found")
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "slime"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        from aiohttp import web

        session = self._sessions.get(request.match_info["session"])
        if session is None:
            return _refuse(404, "this episode is over, or never was", "not_found")
        try:
            asked = read_request(await request.json())
            choices = await session.complete(asked)
        except json.JSONDecodeError as error:
            return _refuse(400, f"the body is no JSON: {error}", "invalid_json")
        except RequestError as error:
            return _refuse(400, str(error), "invalid_request")
        except EpisodeTruncated as truncation:
            return _refuse(400, str(truncation), _code(truncation))
        except Exception as error:  # noqa: BLE001 - the border to a client: the episode raises it again
            return _refuse(500, f"{type(error).__name__}: {error}", "engine")
        if not asked.stream:
            return web.json_response(response.completion(MODEL, choices, session.tokenizer if asked.logprobs else None))
        stream = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
        await stream.prepare(request)
        for chunk in response.chunks(MODEL, choices, asked.include_usage):
            await stream.write(chunk)
        await stream.write_eof()
        return stream


def _code(truncation: EpisodeTruncated) -> str:
    """Agents know this one, and may shorten their history."""
    return "context_length_exceeded" if truncation.reason == "context_full" else truncation.reason


def _refuse(status: int, message: str, code: str) -> web.Response:
    from aiohttp import web

    kind = "invalid_request_error" if status < 500 else "server_error"
    return web.json_response(response.error(message, kind, code), status=status, headers=DO_NOT_RETRY)
