"""Garbage, full buffers, and processes that die or hang."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgpack
import pytest
import zmq
import zmq.asyncio

from slime_async.protocol import (
    PROTOCOL_VERSION,
    Deliver,
    ErrorReply,
    GetStatus,
    Heartbeat,
    Hello,
    Lease,
    Message,
    NotReady,
    Ok,
    ResumeEngine,
    Welcome,
)
from slime_async.transport.codec import decode, encode
from slime_async.transport.conversation import MAX_UNATTENDED
from slime_async.transport.errors import ConnectionLost
from slime_async.transport.server import MAX_HANDLING, MAX_STRIKES
from slime_async.transport.stream import HIGH_WATER_MARK
from tests.transport.transport_kit import INTERVAL_S, TIMEOUT_S, Hub, a_client, a_hub, eventually, run, trajectory


class Raw:
    """A peer made of a bare socket: does exactly what a test tells it, and reads only when told."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket

    async def send(self, message: Message, call_id: int = 0) -> None:
        await self.socket.send_multipart(encode(message, call_id=call_id))

    async def send_frames(self, frames: Sequence[bytes]) -> None:
        await self.socket.send_multipart(frames)

    async def receive(self) -> Message:
        """The next message that is no heartbeat."""
        while True:
            message = decode(await asyncio.wait_for(self.socket.recv_multipart(), 10)).message
            if not isinstance(message, Heartbeat):
                return message

    async def beat(self) -> None:
        while True:
            await self.send(Heartbeat())
            await asyncio.sleep(INTERVAL_S)


@asynccontextmanager
async def a_raw_peer(hub: Hub, name: str | None = "raw") -> AsyncIterator[Raw]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.connect(hub.server.address)
    raw = Raw(socket)
    try:
        if name is not None:
            await raw.send(Hello("actor", name), call_id=1)
            assert isinstance(await raw.receive(), Welcome)
        beating = asyncio.create_task(raw.beat() if name is not None else asyncio.sleep(0))
        yield raw
        beating.cancel()
    finally:
        context.destroy(linger=0)


# ------------------------------------------------------------------------------------------- garbage


def test_a_peer_that_sends_garbage_is_told_and_then_cut_off() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub) as raw:
            for _ in range(MAX_STRIKES):
                assert not hub.left
                await raw.send_frames([b"\xc1", b"garbage"])
                reply = await raw.receive()
                assert isinstance(reply, ErrorReply)
                assert reply.code == "BadMessage"
            last = await raw.receive()
            assert isinstance(last, ErrorReply)
            assert last.code == "NotConnected"
            await eventually(lambda: hub.left)
            name, reason = hub.left[0]
            assert name == "raw"
            assert "cut off: sent 8 messages that break the rules" in reason
            disconnected = raw.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            await raw.send_frames([b"more"])
            await asyncio.wait_for(disconnected.recv_multipart(), 10)
            assert hub.server.statistics().ignored > 0
            assert hub.server.statistics().hung_up > 0
            assert hub.server.statistics().bad == MAX_STRIKES
            assert hub.server.statistics().cut_off == 1

    run(scenario())


def test_a_bad_call_is_answered_to_its_caller() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub) as raw:
            await raw.send_frames([msgpack.packb([PROTOCOL_VERSION, 77, False, ["Finish", {"reason": 5}]])])
            frames = await asyncio.wait_for(raw.socket.recv_multipart(), 10)
            while isinstance(decode(frames).message, Heartbeat):
                frames = await asyncio.wait_for(raw.socket.recv_multipart(), 10)
            message, call_id, reply, also = decode(frames)
            assert (call_id, reply, also) == (77, True, ())
            assert message == ErrorReply("BadMessage", "Finish.reason: wants str, got int 5")
            assert not hub.left

    run(scenario())


def test_a_connection_is_one_peer_whatever_names_it_gives() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub) as raw:
            await raw.send(Hello("actor", "other"), call_id=2)
            assert await raw.receive() == ErrorReply("ValueError", "raw said Hello twice: once per connection")
            assert list(hub.server.peers) == ["raw"]

    run(scenario())


def test_strangers_are_answered_until_they_get_no_more_answers() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub, name=None) as raw:
            for _ in range(MAX_STRIKES):
                await raw.send(GetStatus(), call_id=1)
                reply = await raw.receive()
                assert isinstance(reply, ErrorReply)
                assert reply.code == "NotConnected"
                assert "say Hello first" in reply.message
            await raw.send(GetStatus(), call_id=1)
            await eventually(lambda: hub.server.statistics().ignored == MAX_STRIKES + 1)
            assert not hub.calls

    run(scenario())


def test_a_hello_of_another_version_is_told_both_versions() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub, name=None) as raw:
            await raw.send_frames([msgpack.packb([99, 1, False, ["Hello", {"who": "knows"}]])])
            reply = await raw.receive()
            assert isinstance(reply, ErrorReply)
            assert f"version 99, this side {PROTOCOL_VERSION}" in reply.message
            assert not hub.joined

    run(scenario())


def test_frames_beyond_the_limit_break_the_connection_before_they_are_read() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub) as raw:
            await raw.send_frames([b"x", bytes((64 << 20) + 1)])
            await eventually(lambda: hub.left)
            assert hub.server.statistics().bad == 0

    run(scenario())


def test_a_peer_that_never_waits_for_replies_is_cut_off() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub) as raw:
            for i in range(MAX_HANDLING + 1):
                await raw.send(Lease(1, 1, 20), call_id=i + 2)
            await eventually(lambda: hub.left)
            assert "more than 4096 calls and notes in progress" in hub.left[0][1]
            await eventually(lambda: hub.cancelled == len(hub.calls))

    run(scenario())


def test_a_bug_in_what_is_told_of_a_leaving_peer_ends_serve() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            serving = asyncio.create_task(hub.server.serve())
            hub.left = None  # type: ignore[assignment]
            async with a_client(hub.server.address):
                pass
            with pytest.raises(AttributeError, match="append"):
                await serving

    run(scenario())


# ------------------------------------------------------------------------------------------- full buffers

LARGE = "x" * 400_000


def test_messages_that_find_no_room_wait_and_arrive_once_each_in_order() -> None:
    async def scenario() -> None:
        async with a_hub(heartbeat_timeout_s=20) as hub, a_raw_peer(hub) as raw:
            count = 4 * HIGH_WATER_MARK
            notes = [asyncio.create_task(hub.server.note("raw", NotReady(f"{i} {LARGE}"))) for i in range(count)]
            await eventually(lambda: hub.server.statistics().blocked > 0)
            waiting = hub.server.statistics().blocked
            assert 0 < sum(not note.done() for note in notes) <= waiting < count
            got = [await raw.receive() for _ in range(count)]
            assert [int(note.reason.split()[0]) for note in got] == list(range(count))
            await asyncio.gather(*notes)
            assert hub.server.statistics().blocked == waiting

    run(scenario())


def test_a_peer_that_takes_nothing_blocks_no_other_and_is_cut_off_once() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_raw_peer(hub), a_client(hub.server.address) as (client, inbox):
            notes = [asyncio.create_task(hub.server.note("raw", NotReady(LARGE))) for _ in range(4 * HIGH_WATER_MARK)]
            await eventually(lambda: hub.server.statistics().blocked > 0)
            assert await client.call(GetStatus(), 10) == Ok()
            await hub.server.note("a", NotReady("for you"))
            await eventually(lambda: inbox.messages == [NotReady("for you")])
            outcomes = await asyncio.gather(*notes, return_exceptions=True)
            failed = [o for o in outcomes if o is not None]
            assert 0 < len(failed) <= hub.server.statistics().blocked  # some may have found room after all
            assert all(isinstance(o, ConnectionLost) and "cut off: took no message" in str(o) for o in failed)
            assert [name for name, _ in hub.left] == ["raw"]
            assert hub.server.statistics().cut_off == 1

    run(scenario())


def test_notes_sent_without_waiting_are_refused_once_too_many_wait() -> None:
    async def scenario() -> None:
        async with a_hub(heartbeat_timeout_s=20) as hub, a_raw_peer(hub) as raw:
            assert not hub.server.note_nowait("nobody", NotReady("0"))
            count = 0
            while hub.server.note_nowait("raw", NotReady(f"{count} {LARGE}")):
                count += 1
            assert count > MAX_UNATTENDED
            assert hub.server.statistics().blocked == MAX_UNATTENDED
            got = [await raw.receive() for _ in range(count)]
            assert [int(note.reason.split()[0]) for note in got] == list(range(count))
            assert hub.server.note_nowait("raw", NotReady("again"))
            assert await raw.receive() == NotReady("again")

    run(scenario())


def test_a_message_taken_back_while_it_waits_is_not_sent() -> None:
    async def scenario() -> None:
        async with a_hub(heartbeat_timeout_s=20) as hub, a_raw_peer(hub) as raw:
            notes = []
            while not hub.server.statistics().blocked:
                notes.append(asyncio.create_task(hub.server.note("raw", NotReady(LARGE))))
                await asyncio.sleep(0)
            taken_back = asyncio.create_task(hub.server.note("raw", NotReady("never")))
            last = asyncio.create_task(hub.server.note("raw", NotReady("last")))
            await asyncio.sleep(0)
            taken_back.cancel()
            got = [await raw.receive() for _ in range(len(notes) + 1)]
            assert [note.reason for note in got] == [LARGE] * len(notes) + ["last"]
            await asyncio.gather(*notes, last)

    run(scenario())


# ------------------------------------------------------------------------------------------- dead processes

ACTOR = """
import asyncio, sys
from slime_async.protocol import Hello, Ok
from slime_async.transport.client import HubClient

async def main():
    async def never(message):
        await asyncio.Event().wait()
    client = await HubClient.connect(sys.argv[1], Hello("actor", "other"), handler=never)
    try:
        await client.wait_closed()
    except ConnectionError as error:
        print(error, flush=True)
        await client.close()

asyncio.run(main())
"""

HUB = """
import asyncio
from slime_async.protocol import Ok, Welcome
from slime_async.transport.server import Server

async def main():
    async def on_join(peer, hello):
        return Welcome("run", 0, 0, 0)
    async def on_call(peer, message):
        await asyncio.Event().wait()
    async def on_note(peer, message):
        pass
    server = Server("tcp://127.0.0.1:0", on_call=on_call, on_note=on_note, on_join=on_join,
                    on_leave=lambda peer, reason: None, heartbeat_interval_s=0.05, heartbeat_timeout_s=1.0)
    await server.start()
    print(server.address, flush=True)
    await server.serve()

asyncio.run(main())
"""


@asynccontextmanager
async def a_process(script: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *arguments, env=env, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_a_killed_actor_leaves_once_and_its_calls_fail() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_process(ACTOR, hub.server.address) as actor:
            await eventually(lambda: hub.joined)
            resume = asyncio.create_task(hub.server.call("other", ResumeEngine("e"), 20))
            await asyncio.sleep(0)
            actor.kill()
            with pytest.raises(ConnectionLost, match="actor other left: closed the connection"):
                await resume
            await actor.wait()
            assert [name for name, _ in hub.left] == ["other"]
            assert not hub.server.peers

    run(scenario())


def test_an_actor_that_hangs_leaves_by_its_silence_and_learns_of_it_when_it_wakes() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_process(ACTOR, hub.server.address) as actor:
            await eventually(lambda: hub.joined)
            actor.send_signal(signal.SIGSTOP)
            await eventually(lambda: hub.left)
            name, reason = hub.left[0]
            assert name == "other"
            assert "silent for" in reason or "closed the connection" in reason
            actor.send_signal(signal.SIGCONT)
            assert actor.stdout is not None
            said = await asyncio.wait_for(actor.stdout.readline(), 15)
            assert b"lost the hub" in said
            assert len(hub.left) == 1

    run(scenario())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_hub_that_dies_or_hangs_is_noticed_by_its_clients(how: signal.Signals) -> None:
    async def scenario() -> None:
        async with a_process(HUB) as hub:
            assert hub.stdout is not None
            address = (await asyncio.wait_for(hub.stdout.readline(), 20)).decode().strip()
            async with a_client(address) as (client, _):
                assert client.welcome.heartbeat_timeout_s == TIMEOUT_S
                lease = asyncio.create_task(client.call(Lease(1, 1, 60), 60))
                deliver = asyncio.create_task(client.call(Deliver(trajectory(4096)), 60))
                await asyncio.sleep(0)
                hub.send_signal(how)
                for call in (lease, deliver):
                    with pytest.raises(ConnectionLost, match="lost the hub"):
                        await call
                with pytest.raises(ConnectionLost, match="lost the hub"):
                    await client.wait_closed()

    run(scenario())
