"""A hub that only answers, its clients, and peers in processes of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from slime_async.protocol import Finish, GetStatus, Hello, Message, Ok, Welcome
from slime_async.transport.client import Handler, HubClient
from slime_async.transport.server import Peer, Server

DEADLINE_S = 20.0
"""Of every test: none waits so long unless something is broken."""
Result = TypeVar("Result")


def run(test: Coroutine[Any, Any, Result]) -> Result:
    async def bounded() -> Result:
        async with asyncio.timeout(DEADLINE_S):
            return await test

    return asyncio.run(bounded())


async def nothing(message: Message) -> Message | None:
    """A handler for peers that the hub never tells anything."""
    raise AssertionError(f"unexpected {message}")


class Answering:
    """A hub with a script: ``Finish("wait")`` waits for ``gate``, ``Finish("fail")`` raises, any other comes back with
    its caller's name; ``GetStatus`` is a call only."""

    def __init__(self, interval_s: float, timeout_s: float) -> None:
        self.gate = asyncio.Event()
        self.notes: list[Message] = []
        self.calls: asyncio.Queue[Message] = asyncio.Queue()
        self.left: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.welcome = Welcome("run", interval_s, timeout_s, 3)
        self.server = Server(
            "tcp://127.0.0.1:0",
            on_call=self.on_call,
            on_note=self.on_note,
            on_join=self.on_join,
            on_leave=self.on_leave,
            heartbeat_interval_s=interval_s,
            heartbeat_timeout_s=timeout_s,
        )

    async def on_call(self, peer: Peer, message: Message) -> Message:
        self.calls.put_nowait(message)
        match message:
            case Finish("wait"):
                await self.gate.wait()
            case Finish("fail"):
                raise LookupError("no such thing")
            case Finish(reason):
                return Finish(f"{peer.name}: {reason}")
        return Ok()

    async def on_note(self, peer: Peer, message: Message) -> None:
        if isinstance(message, GetStatus):
            raise ValueError("GetStatus is no note")
        self.notes.append(message)

    async def on_join(self, peer: Peer, hello: Hello) -> Welcome:
        if hello.slots == 13:
            raise ValueError("13 slots bring bad luck: use 12")
        return self.welcome

    async def on_leave(self, peer: Peer, reason: str) -> None:
        self.left.put_nowait((peer.name, reason))


@asynccontextmanager
async def answering(interval_s: float = 0.1, timeout_s: float = 5.0) -> AsyncIterator[Answering]:
    hub = Answering(interval_s, timeout_s)
    await hub.server.start()
    serving = asyncio.create_task(hub.server.serve())
    try:
        yield hub
        assert not serving.done(), serving  # whatever peers do, the hub serves on
    finally:
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
        await hub.server.close()


@asynccontextmanager
async def joined(hub: Answering, name: str, handler: Handler = nothing) -> AsyncIterator[HubClient]:
    client = await HubClient.connect(hub.server.address, Hello("observer", name), handler=handler)
    try:
        yield client
    finally:
        await client.close()


PEER_PROGRAM = """
import asyncio, sys
from slime_async.protocol import Hello
from slime_async.transport.client import HubClient

async def wait_forever(message):
    await asyncio.Event().wait()

async def main():
    client = await HubClient.connect(sys.argv[1], Hello("actor", sys.argv[2]), handler=wait_forever)
    print("joined", flush=True)
    await client.wait_closed()

asyncio.run(main())
"""


@asynccontextmanager
async def peer_process(hub: Answering, name: str) -> AsyncIterator[subprocess.Popen[str]]:
    """A peer that answers no call, in a process that can be stopped and killed."""
    command = [sys.executable, "-c", PEER_PROGRAM, hub.server.address, name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "joined\n"
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)
