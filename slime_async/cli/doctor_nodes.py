"""The doctor on several nodes: one collects, the others report to it, over plain TCP, for the minute that this takes.

::

    node ── connects ──────────────► collector     ports, one way
         ── "time", five times ────►               clocks, from the fastest round trip
         ── "reach" PORT ──────────►               ports, the other way: the collector connects back
         ── "shared" ──────────────►               the name of a file in run.directory, which the node looks for
         ── "report" {…} ──────────►               everything else

One JSON object per line either way. Reports hold versions and NCCL's variables; keys or other secrets are not in them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from slime_async.config import Config, ConfigError
from slime_async.doctor.finding import Finding
from slime_async.doctor.node import Node, Probe, describe_node

ROUND_TRIPS = 5
LINE_LIMIT_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
COLLECT_TIMEOUT_S = 300.0
"""Nodes may have to import torch from a slow disk first"""


class Collector:
    """Takes reports until there are enough, or time is up."""

    def __init__(self, config: Config, wanted: int) -> None:
        self._wanted = wanted
        self._directory = config.run.directory.absolute()
        self._file = self._directory / f".doctor-{secrets.token_hex(8)}"
        self._nodes: list[Node] = []
        self._enough = asyncio.Event()

    async def collect(self, host: str, port: int, started: Callable[[str], Any], timeout_s: float) -> list[Node]:
        """Listen, tell ``started`` where, and wait; gives the reports that came."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file.write_text("seen")
        server = await asyncio.start_server(self._talk, host, port, limit=LINE_LIMIT_BYTES)
        try:
            listening = server.sockets[0].getsockname()
            starting = started(f"{listening[0]}:{listening[1]}")
            if starting is not None:
                await starting
            async with asyncio.timeout(timeout_s):
                await self._enough.wait()
        except TimeoutError:
            pass  # who is missing, the findings say
        finally:
            server.close()
            self._file.unlink(missing_ok=True)
        return self._nodes

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")[0]
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(json.loads(line), peer)).encode() + b"\n")
                await writer.drain()
        except (ValueError, OSError) as error:  # not one of ours, or gone
            writer.write(json.dumps({"error": str(error)}).encode() + b"\n")
        finally:
            writer.close()

    async def _answer(self, asked: dict[str, Any], peer: str) -> dict[str, Any]:
        match asked.get("ask"):
            case "time":
                return {"time_ns": time.time_ns()}
            case "reach":
                return {"reached": await can_connect(peer, int(asked["port"]))}
            case "shared":
                return {"file": self._file.name}
            case "report":
                self._nodes.append(Node.from_json(asked["report"]))
                if len(self._nodes) >= self._wanted:
                    self._enough.set()
                return {"taken": True}
        raise ValueError(f"unknown request {asked.get('ask')!r}")


async def report(config: Config, address: str, findings: Sequence[Finding]) -> Node:
    """Measure against the collector at ``HOST:PORT``, and tell it of this node. Raises ``ConfigError``."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, int(port), limit=LINE_LIMIT_BYTES)
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"{socket.gethostname()} cannot reach the collector at {address} ({error!r}): open this port "
            "between the nodes, or have the collector listen elsewhere (--listen)"
        ) from error

    async def ask(what: str, **more: Any) -> dict[str, Any]:
        writer.write(json.dumps({"ask": what, **more}).encode() + b"\n")
        await writer.drain()
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer: dict[str, Any] = json.loads(await reader.readline())
        if "error" in answer:
            raise ConfigError(f"the collector at {address} says: {answer['error']}")
        return answer

    try:
        offset_s, error_s = await _clock(ask)
        name = (await ask("shared"))["file"]
        probe = Probe(offset_s, error_s, await _reached_back(ask), (config.run.directory.absolute() / name).exists())
        node = describe_node(config, probe, findings)
        await ask("report", report=node.as_json())
    finally:
        writer.close()
    return node


async def _clock(ask: Callable[..., Any]) -> tuple[float, float]:
    """(offset, error): the collector's time lies somewhere between asking and having the answer."""
    best: tuple[int, int] | None = None
    for _ in range(ROUND_TRIPS):
        sent_ns = time.time_ns()
        answer = await ask("time")
        received_ns = time.time_ns()
        trip = (received_ns - sent_ns, (sent_ns + received_ns) // 2 - int(answer["time_ns"]))
        best = min(best or trip, trip)
    assert best is not None
    return best[1] / 1e9, best[0] / 2e9


async def _reached_back(ask: Callable[..., Any]) -> bool:
    """Listen on a free port, as a learner's weight group does, and have the collector connect."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "0.0.0.0", 0)
    async with server:
        answer = await ask("reach", port=server.sockets[0].getsockname()[1])
    return bool(answer["reached"])


async def can_connect(host: str, port: int) -> bool:
    """Within ``CONNECT_TIMEOUT_S``."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
