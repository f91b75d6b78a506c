"""SGLang's HTTP interface: control calls, and answers as they are streamed. Knows paths and bodies, no life cycle."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import aiohttp

from slime_async.actors.engine import EngineError, GenerateRequest
from slime_async.actors.sglang.exchanges import Exchanges

CONNECT_TIMEOUT_S = 10.0
IDLE_S = 3.0
"""A connection that was idle for longer is not used again. SGLang closes it after 5 s; what is sent then is lost"""
HTTP_OK, HTTP_NOT_FOUND = 200, 404
EVENT_BYTES = 1 << 30
"""The longest streamed event; a whole answer of 128k tokens takes 8 MB, its routed experts up to half a GB"""


class EngineRefused(EngineError):
    """The server answered, and said no. It lives."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer: what is new in it."""

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    """``stop``, ``length`` or ``abort`` in the last chunk"""
    meta: Mapping[str, Any]


def running_at_most(info: Mapping[str, Any]) -> float:
    """Requests that a server decodes at once, all its data-parallel ranks together, by what it says of itself."""
    limits = [state.get("effective_max_running_requests_per_dp", 0) for state in info.get("internal_states") or ()]
    return float(sum(limits)) if all(limits) and limits else math.inf


class SGLangClient:
    """One server by URL. Every failure is an ``EngineError`` that names the server, the path and the cause."""

    def __init__(
        self, url: str, name: str, *, api_key: str = "", admin_key: str = "", ready_paths: Sequence[str] = ("/ready",)
    ) -> None:
        """With both keys, SGLang wants the first for answers and the second for control; with one, that for all.

        The first of ``ready_paths`` that the server knows is asked whether it is ready.
        """
        self.url = url.rstrip("/")
        self._name = name
        self._api_key, self._admin_key = api_key or admin_key, admin_key or api_key
        self._ready_paths = list(ready_paths)
        self._session = aiohttp.ClientSession(
            # as many answers at once as the engine takes
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        )
        self._exchanges = Exchanges(name, self._post)

    async def close(self) -> None:
        await self._exchanges.close()
        await self._session.close()

    async def ready(self, timeout_s: float) -> bool:
        """Whether the server takes requests; False also while it is paused. Raises when it does not answer."""
        while True:
            async with self._call("GET", self._ready_paths[0], None, timeout_s) as response:
                if response.status != HTTP_NOT_FOUND or len(self._ready_paths) == 1:
                    return response.status == HTTP_OK
            self._ready_paths.pop(0)

    async def server_info(self, timeout_s: float) -> dict[str, Any]:
        """The server's arguments, its version among them, and in ``internal_states`` what each rank made of them."""
        return await self._json("GET", "/server_info", None, timeout_s)

    async def post(self, path: str, body: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """A control call. Raises ``EngineRefused`` with the server's own words where it says no."""
        reply = await self._json("POST", path, body, timeout_s)
        if reply.get("success") is False:
            raise EngineRefused(f"{self._name}: {path}: {reply.get('message')}")
        return reply

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The chunks of one answer, until it is finished. Who leaves early aborts the request by its ``rid``."""
        seen = 0
        async with aclosing(self._exchanges.ask({**body, "stream": True})) as events:
            async for event in events:
                meta = event["meta_info"]
                new = int(meta["completion_tokens"]) - seen
                seen += new
                yield _chunk(event, meta, new)
                if meta["finish_reason"] is not None:
                    return

    async def _post(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one call of ``/generate``."""
        async with self._call("POST", "/generate", body, math.inf) as response:
            await self._check(response, "/generate")
            async for event in self._events(response):
                if "error" in event:
                    raise EngineRefused(f"{self._name}: /generate: {_message(event['error'])}")
                yield event

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events, each one JSON object; read by hand, as aiohttp's lines end at 64 kB."""
        buffer = bytearray()
        async for data in response.content.iter_any():
            searched = max(0, len(buffer) - 1)  # large events come in many pieces: none is looked at twice
            buffer += data
            while (end := buffer.find(b"\n\n", searched)) >= 0:
                text = bytes(buffer[:end]).strip().removeprefix(b"data:").strip()
                del buffer[: end + 2]
                searched = 0
                if text and text != b"[DONE]":
                    yield json.loads(text)
            if len(buffer) > EVENT_BYTES:
                raise EngineError(f"{self._name}: an event of more than {EVENT_BYTES} bytes: is this SGLang?")

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        async with self._call(method, path, body, timeout_s) as response:
            await self._check(response, path)
            text = await response.text()
        try:
            reply = json.loads(text) if text.strip() else {}
        except ValueError:
            reply = {"message": text}  # some calls answer with a sentence
        return reply if isinstance(reply, dict) else {"value": reply}

    async def _check(self, response: aiohttp.ClientResponse, path: str) -> None:
        if response.status != HTTP_OK:
            text = await response.text()
            raise EngineRefused(f"{self._name}: {path}: HTTP {response.status}: {_message(text)}")

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> _Call:
        total = None if timeout_s == math.inf else timeout_s
        key = self._api_key if path == "/generate" else self._admin_key
        request = self._session.request(
            method,
            self.url + path,
            json=body,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=aiohttp.ClientTimeout(total=total, sock_connect=CONNECT_TIMEOUT_S),
        )
        return _Call(request, self._name, path, total)


class _Call:
    """One exchange; whatever breaks it, in any place, becomes an ``EngineError``."""

    def __init__(self, request: Any, name: str, path: str, timeout_s: float | None) -> None:
        self._request, self._name, self._path, self._timeout_s = request, name, path, timeout_s

    async def __aenter__(self) -> aiohttp.ClientResponse:
        try:
            response: aiohttp.ClientResponse = await self._request.__aenter__()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._explain(error) from error
        return response

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        await self._request.__aexit__(kind, error, trace)
        if isinstance(error, aiohttp.ClientError | OSError | TimeoutError) and not isinstance(error, EngineError):
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> EngineError:
        if isinstance(error, TimeoutError | asyncio.TimeoutError) and self._timeout_s is not None:
            return EngineError(f"{self._name}: {self._path}: no answer within {self._timeout_s:g} s")
        return EngineError(f"{self._name}: {self._path}: {type(error).__name__}: {error}")


def generate_body(
    request: GenerateRequest, max_new_tokens: int, cache_key: str, *, seeded: bool, record_routing: bool
) -> dict[str, Any]:
    """The body of ``/generate``. ``seeded``: the server samples by seed and absolute position."""
    sampling = request.sampling
    params: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k > 0 else -1,
        "skip_special_tokens": False,
    }
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    else:
        params["ignore_eos"] = True
    if seeded and sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    return {
        "rid": request.request_id,
        "input_ids": list(request.prompt_ids),
        "sampling_params": params,
        "return_logprob": True,
        "extra_key": cache_key,
        **({"return_routed_experts": True} if record_routing else {}),
    }


def _chunk(event: Mapping[str, Any], meta: Mapping[str, Any], new: int) -> Chunk:
    """The last ``new`` tokens, whether the server sends pieces or the whole answer so far each time."""
    reason = meta["finish_reason"]
    ids, pairs = event.get("output_ids") or [], meta.get("output_token_logprobs") or []
    if len(ids) < new or len(pairs) < new:
        raise EngineError(f"an answer's chunk has {len(ids)} ids and {len(pairs)} log-probs for {new} new tokens")
    return Chunk(
        output_ids=ids[len(ids) - new :],
        logprobs=[float(pair[0]) for pair in pairs[len(pairs) - new :]],
        finish_reason=None if reason is None else str(reason["type"]),
        meta=meta,
    )


def _message(answer: Any) -> str:
    """The readable part of an error, which comes in several shapes."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError:
            return str(answer)[:2000]
    if isinstance(answer, dict):
        inner = answer.get("error", answer)
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    return str(answer)
