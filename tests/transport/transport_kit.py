"""What the transport's tests share: a hub that writes everything down, waiting with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import uvloop

from slime_async.protocol import Commit, Deliver, Delivered, Hello, Lease, Message, NotReady, Ok, Welcome
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId
from slime_async.transport.client import HubClient
from slime_async.transport.server import Peer, Server

T = TypeVar("T")
LIMIT_S = 30.0


def run(work: Coroutine[Any, Any, T]) -> T:
    """One test on an event loop of its own, with a deadline."""
    return uvloop.run(asyncio.wait_for(work, LIMIT_S))


async def eventually(condition: Callable[[], object], limit_s: float = 15.0) -> None:
    """Returns once ``condition`` holds."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.002)


def trajectory(tokens: int = 16, extra_bytes: int = 0) -> Trajectory:
    mask = np.ones(tokens, np.uint8)
    mask[: tokens // 4] = 0
    return Trajectory(
        task=TaskRef(serial=3, source="sums", index=5),
        sample=1,
        attempt=0,
        token_ids=np.arange(tokens, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.linspace(-2, 0, tokens, dtype=np.float32),
        spans=(VersionSpan(tokens // 4, WeightId(1, 7)), VersionSpan(tokens // 2, WeightId(1, 8))),
        reward=1.0,
        finish_reason="stop",
        metrics={"turns": 2.0},
        extras={"routed_experts": np.arange(extra_bytes, dtype=np.uint8)} if extra_bytes else {},
    )


# ------------------------------------------------------------------------------------------- a hub

INTERVAL_S = 0.05
TIMEOUT_S = 1.0


class Hub:
    """A server that accepts everything and writes it down."""

    def __init__(self, address: str = "tcp://127.0.0.1:0", **options: Any) -> None:
        self.joined: list[Hello] = []
        self.left: list[tuple[str, str]] = []
        self.calls: list[Message] = []
        self.notes: list[Message] = []
        self.gate = asyncio.Event()
        self.cancelled = 0
        options = {"heartbeat_interval_s": INTERVAL_S, "heartbeat_timeout_s": TIMEOUT_S} | options
        self.server = Server(
            address,
            on_call=self.on_call,
            on_note=self.on_note,
            on_join=self.on_join,
            on_leave=lambda peer, reason: self.left.append((peer.name, reason)),
            **options,
        )

    async def on_join(self, peer: Peer, hello: Hello) -> Welcome:
        if hello.name == "unwanted":
            raise ValueError("unwanted is not wanted here")
        self.joined.append(hello)
        return Welcome(run_id="run", heartbeat_interval_s=99.0, heartbeat_timeout_s=99.0, version=4)

    async def on_call(self, peer: Peer, message: Message) -> Message:
        self.calls.append(message)
        if isinstance(message, Deliver):
            return Delivered("accepted")
        if isinstance(message, Lease):  # held until the test opens the gate
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return NotReady("the gate was opened")
        if isinstance(message, Commit):
            if message.train_version < 0:
                raise ValueError(f"cannot commit {message.train_version}")
            return {}["a bug"]  # type: ignore[no-any-return]
        return Ok()

    async def on_note(self, peer: Peer, message: Message) -> None:
        self.notes.append(message)


@asynccontextmanager
async def a_hub(address: str = "tcp://127.0.0.1:0", **options: Any) -> AsyncIterator[Hub]:
    hub = Hub(address, **options)
    await hub.server.start()
    try:
        yield hub
    finally:
        await hub.server.close()


class Inbox:
    """A client's handler that writes down what the hub sends."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> Message | None:
        self.messages.append(message)
        return Ok()


@asynccontextmanager
async def a_client(address: str, name: str = "a", **options: Any) -> AsyncIterator[tuple[HubClient, Inbox]]:
    inbox = Inbox()
    options = {"handler": inbox, "timeout_s": 10.0} | options
    client = await HubClient.connect(address, Hello("actor", name, slots=4), **options)
    try:
        yield client, inbox
    finally:
        await client.close()
