"""Whoever floods the hub, or holds connections half open, keeps no other client from its work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from slime_async.protocol import Deliver, Delivered
from slime_async.transport import stream
from tests.transport.transport_kit import Hub, a_client, a_hub, eventually, run, trajectory

CALLS = 200


async def deliver_many(address: str) -> None:
    """A good client's work, to its end."""
    sent = trajectory(1024)
    async with a_client(address, "good") as (client, _):
        for _ in range(CALLS // 8):
            replies = await asyncio.gather(*(client.call(Deliver(sent), 20) for _ in range(8)))
            assert replies == [Delivered("accepted")] * 8


@contextmanager
def a_flood(address: str, frames: list[bytes]) -> Iterator[Callable[[], int]]:
    """A socket that sends this as fast as it can, and connects again whenever it is thrown out; yields how often it
    has been sent."""
    stop, sent = threading.Event(), [0]

    def flood() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 8)
        socket.setsockopt(zmq.RECONNECT_IVL, 1)
        socket.connect(address)
        while not stop.is_set():
            if socket.poll(50, zmq.POLLOUT):
                socket.send_multipart(frames, copy=False)
                sent[0] += 1
        socket.close()
        context.term()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        yield lambda: sent[0]
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("kind", ["garbage", "oversized frames", "calls of a stranger"])
def test_a_flood_leaves_others_standing(kind: str) -> None:
    frames = {
        "garbage": [b"\xc1", b"x" * 100],
        "oversized frames": [b"x", bytes((64 << 20) + 1)],
        "calls of a stranger": [b"\x94\x02\x01\xc2\x92\xa9GetStatus\x80"],
    }[kind]

    async def scenario() -> None:
        async with a_hub(heartbeat_timeout_s=20.0) as hub:
            with a_flood(hub.server.address, frames) as sent:
                await eventually(lambda: sent() > 20)
                before = sent()
                await deliver_many(hub.server.address)
                await eventually(lambda: sent() > before)
            counted = hub.server.statistics()
            assert len(hub.calls) == CALLS
            assert [hello.name for hello in hub.joined] == ["good"]
            if kind != "oversized frames":  # those end their connection before anything is read
                assert counted.bad + counted.ignored > 0
                assert counted.hung_up > 0

    run(scenario())


def test_connections_held_half_open_keep_nobody_out_and_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HANDSHAKE_S", 1.0)

    async def half_open(hub: Hub) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(hub.server.address.rsplit(":", 1)[1]))
        writer.write(b"\xff\x00\x00")  # the beginning of a greeting
        return reader, writer

    async def scenario() -> None:
        async with a_hub(heartbeat_timeout_s=20.0) as hub:
            held = [await half_open(hub) for _ in range(200)]
            await deliver_many(hub.server.address)
            for reader, writer in held:
                while await asyncio.wait_for(reader.read(1000), 20):
                    pass  # the hub's own greeting
                writer.close()
            assert len(hub.calls) == CALLS

    run(scenario())
