"""Calls and notes over real sockets, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import pytest

from slime_async.protocol import (
    PROTOCOL_VERSION,
    Commit,
    Deliver,
    Delivered,
    Failed,
    GetStatus,
    Heartbeat,
    Hello,
    Lease,
    Message,
    NotReady,
    Ok,
    ResumeEngine,
    Shutdown,
    Welcome,
)
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.client import HubClient
from slime_async.transport.codec import DEFAULT_LIMITS, BadMessage, Buffer, Envelope, Limits, decode
from slime_async.transport.conversation import Conversation, Traffic
from slime_async.transport.errors import ConnectionLost, DeadlineExceeded, RemoteError
from slime_async.transport.server import Server
from tests.transport.examples import same
from tests.transport.transport_kit import INTERVAL_S, TIMEOUT_S, Inbox, a_client, a_hub, eventually, run, trajectory


def test_calls_and_notes_go_both_ways() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, inbox):
            assert client.welcome == Welcome("run", INTERVAL_S, TIMEOUT_S, 4)
            assert hub.joined == [Hello("actor", "a", slots=4)]
            sent = trajectory(8192, extra_bytes=1 << 20)
            assert await client.call(Deliver(sent), 10) == Delivered("accepted")
            assert same(hub.calls[0].trajectory, sent)
            assert await hub.server.call("a", ResumeEngine("e"), 10) == Ok()
            await hub.server.note("a", Shutdown("enough"))
            await eventually(lambda: inbox.messages == [ResumeEngine("e"), Shutdown("enough")])

    run(scenario())


def test_notes_arrive_in_the_order_in_which_they_were_sent() -> None:
    async def scenario() -> None:
        async with (
            a_hub(heartbeat_interval_s=9, heartbeat_timeout_s=20) as hub,
            a_client(hub.server.address) as (
                client,
                inbox,
            ),
        ):
            for i in range(500):
                await client.note(Failed(TrajectoryKey(i, 0), 0, "x"))
                await hub.server.note("a", NotReady(str(i)))
            await eventually(lambda: len(hub.notes) == len(inbox.messages) == 500)
            assert [note.key.task for note in hub.notes] == list(range(500))
            assert [note.reason for note in inbox.messages] == [str(i) for i in range(500)]

    run(scenario())


def test_a_call_that_waits_blocks_no_other() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, _):
            lease = asyncio.create_task(client.call(Lease(1, 4, 20), 20))
            assert await client.call(GetStatus(), 10) == Ok()
            assert not lease.done()
            hub.gate.set()
            assert await lease == NotReady("the gate was opened")

    run(scenario())


def test_what_the_hub_sends_on_joining_comes_after_the_welcome() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            inbox = Inbox()
            on_join = hub.on_join

            async def join(peer: Any, hello: Hello) -> Welcome:
                await hub.server.note(peer.name, Shutdown("early"))
                return await on_join(peer, hello)

            hub.server._on_join = join
            client = await HubClient.connect(hub.server.address, Hello("actor", "a"), handler=inbox)
            assert inbox.messages == []
            await eventually(lambda: inbox.messages == [Shutdown("early")])
            await client.close()

    run(scenario())


def test_a_value_error_of_a_handler_answers_its_caller_only() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, _):
            with pytest.raises(RemoteError, match="ValueError: cannot commit -1"):
                await client.call(Commit(1, -1), 10)
            assert await client.call(GetStatus(), 10) == Ok()

    run(scenario())


def test_a_bug_in_the_hubs_handler_answers_its_caller_and_ends_serve() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, _):
            serving = asyncio.create_task(hub.server.serve())
            with pytest.raises(RemoteError, match="KeyError: 'a bug'"):
                await client.call(Commit(1, 1), 10)
            with pytest.raises(KeyError, match="a bug"):
                await serving

    run(scenario())


def test_a_bug_in_a_clients_handler_answers_the_hub_and_ends_the_client() -> None:
    async def broken(message: Message) -> Message | None:
        raise RuntimeError(f"no idea what to do with {type(message).__name__}")

    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address, handler=broken) as (client, _):
            with pytest.raises((RemoteError, ConnectionLost)):
                await hub.server.call("a", ResumeEngine("e"), 10)
            with pytest.raises(RuntimeError, match="no idea"):
                await client.wait_closed()
            with pytest.raises(ConnectionLost, match="this client died"):
                await client.call(GetStatus(), 10)

    run(scenario())


def test_serve_ends_when_the_server_is_closed() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            serving = asyncio.create_task(hub.server.serve())
            await hub.server.close()
            await serving

    run(scenario())


def test_a_deadline_names_the_call_and_the_other_side_and_the_late_reply_is_counted() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, _):
            with pytest.raises(DeadlineExceeded, match=r"hub at tcp://127.* did not answer Lease within 0.01 s"):
                await client.call(Lease(1, 4, 20), 0.01)
            hub.gate.set()
            await eventually(lambda: client.traffic.late == 1)
            with pytest.raises(ConnectionLost, match="no peer named 'nobody'"):
                await hub.server.call("nobody", ResumeEngine("e"), 1)

    run(scenario())


def test_names_are_unique_among_the_living() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            async with a_client(hub.server.address):
                with pytest.raises(RemoteError, match="a peer named 'a' is connected"):
                    async with a_client(hub.server.address):
                        pass
            await eventually(lambda: hub.left == [("a", "it said goodbye")])
            async with a_client(hub.server.address):
                assert len(hub.joined) == 2
                assert list(hub.server.peers) == ["a"]

    run(scenario())


def test_a_refused_hello_never_joined_and_never_leaves() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            with pytest.raises(RemoteError, match="unwanted is not wanted here"):
                async with a_client(hub.server.address, "unwanted"):
                    pass
            assert not hub.joined
            assert not hub.left
            assert not hub.server.peers

    run(scenario())


def test_heartbeats_carry_the_report() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, _):
            client.set_report({"tokens": 17})
            await eventually(lambda: hub.server.peers["a"].report == {"tokens": 17})
            assert hub.server.peers["a"].silent_s < 10

    run(scenario())


def test_a_peer_that_leaves_ends_its_calls_on_both_sides() -> None:
    async def stuck(message: Message) -> Message | None:
        await asyncio.Event().wait()
        return None

    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address, handler=stuck) as (client, _):
            lease = asyncio.create_task(client.call(Lease(1, 4, 20), 20))
            resume = asyncio.create_task(hub.server.call("a", ResumeEngine("e"), 20))
            await eventually(lambda: hub.calls)
            await client.close()
            with pytest.raises(ConnectionLost, match="was closed"):
                await lease
            with pytest.raises(ConnectionLost, match="actor a left: it said goodbye"):
                await resume
            await eventually(lambda: hub.cancelled == 1)

    run(scenario())


def test_a_hub_that_goes_away_ends_its_clients_and_their_calls() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, _):
            lease = asyncio.create_task(client.call(Lease(1, 4, 20), 20))
            await eventually(lambda: hub.calls)
            await hub.server.close()
            with pytest.raises(ConnectionLost, match="lost the hub at tcp"):
                await lease
            with pytest.raises(ConnectionLost, match="lost the hub at tcp"):
                await client.wait_closed()
            with pytest.raises(ConnectionLost, match="lost the hub"):
                await client.note(Heartbeat())

    run(scenario())


def test_nobody_at_the_address_is_said_so() -> None:
    async def scenario() -> None:
        with pytest.raises(ConnectionLost, match=r"no hub at tcp://127.0.0.1:9 within 0.2 s: nobody listens there"):
            async with a_client("tcp://127.0.0.1:9", timeout_s=0.2):
                pass
        with pytest.raises(ValueError, match="cannot connect to 'nonsense'"):
            async with a_client("nonsense"):
                pass

    run(scenario())


def test_a_client_may_start_before_its_hub() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            address = hub.server.address
        early = asyncio.create_task(HubClient.connect(address, Hello("actor", "a"), handler=Inbox(), timeout_s=20))
        async with a_hub(address) as hub:
            client = await early
            assert await client.call(GetStatus(), 10) == Ok()
            await client.close()

    run(scenario())


def test_a_taken_address_is_an_error() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            with pytest.raises(OSError, match="cannot listen at"):
                async with a_hub(hub.server.address):
                    pass

    run(scenario())


def test_a_message_that_cannot_be_sent_is_the_senders_error_and_harms_nobody() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address, limits=Limits(frame_bytes=1000)) as (client, _):
            with pytest.raises(BadMessage, match="the limit is 1000"):
                await client.call(Deliver(trajectory(1000)), 10)
            assert await client.call(GetStatus(), 10) == Ok()

    run(scenario())


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://0.0.0.0:0", "tcp://eth0:5555", "tcp://[::]:0"])
def test_an_address_beyond_loopback_needs_keys_or_consent(address: str) -> None:
    async def unused(*_: Any) -> Any: ...

    def server(**options: Any) -> Server:
        handlers: dict[str, Any] = {"on_call": unused, "on_note": unused, "on_join": unused}
        return Server(address, on_leave=lambda peer, reason: None, **handlers, **options)

    with pytest.raises(ValueError, match=r"can be reached from the network.*hub.insecure = true"):
        server()
    server(insecure=True)


def unexpected(what: object) -> Any:
    raise AssertionError(f"unexpected: {what}")


def conversation(
    send: Callable[[Sequence[Buffer]], bool] = lambda frames: True,
    *,
    on_call: Callable[[Message], Message] = unexpected,
    on_bad: Callable[[BadMessage], None] = unexpected,
) -> Conversation:
    """Without a socket; unless told otherwise, what is sent arrives nowhere, and nothing may come."""
    return Conversation(
        "peer",
        send,
        lambda: None,
        on_call=on_call,
        on_note=unexpected,
        on_bug=unexpected,
        on_bad=on_bad,
        limits=DEFAULT_LIMITS,
        traffic=Traffic(),
    )


def test_equal_acknowledgements_that_wait_are_one_message() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address) as (client, _):
            sent = trajectory(64)
            before = client.traffic.messages_in
            calls = [asyncio.create_task(client.call(Deliver(sent), 10)) for _ in range(20)]
            assert await asyncio.gather(*calls) == [Delivered("accepted")] * 20
            assert client.traffic.messages_in - before < 20
            assert client.traffic.late == client.traffic.bad == 0

    run(scenario())


def test_an_acknowledgement_waits_with_at_most_eight_calls_and_stays_in_order() -> None:
    room = False
    wire: list[list[Any]] = []

    def send(frames: Any) -> bool:
        if room:
            wire.append(list(frames))
        return room

    async def scenario() -> None:
        nonlocal room

        def on_call(message: Message) -> Message:
            return Delivered("duplicate" if isinstance(message, GetStatus) else "accepted")

        talk = conversation(send, on_call=on_call)
        for i in range(1, 20):
            talk.take(Envelope(Lease(1, 4, 20), i, False))
        talk.take(Envelope(GetStatus(), 20, False))
        talk.take(Envelope(Lease(1, 4, 20), 21, False))
        talk.note_nowait(Ok())
        talk.take(Envelope(Lease(1, 4, 20), 22, False))
        room = True
        talk.outbox.flush()
        replies = [decode(frames) for frames in wire]
        assert [(e.call_id, *e.also) for e in replies] == [
            tuple(range(1, 9)), tuple(range(9, 17)), (17, 18, 19), (20,), (21,), (0,), (22,),
        ]  # fmt: skip
        assert [e.message for e in replies[2:5]] == [
            Delivered("accepted"),
            Delivered("duplicate"),
            Delivered("accepted"),
        ]

    run(scenario())


def test_a_shared_reply_that_cannot_be_read_fails_all_its_calls() -> None:
    async def scenario() -> None:
        talk = conversation(on_bad=lambda bad: None)
        calls = [asyncio.create_task(talk.call(GetStatus(), 10)) for _ in range(3)]
        await asyncio.sleep(0)
        talk.receive([msgpack.packb([PROTOCOL_VERSION, 1, True, ["Delivered", {"outcome": "lost"}], [2, 3]])])
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, BadMessage)
            assert "Delivered.outcome" in str(outcome)

    run(scenario())


def test_each_call_ends_at_its_own_deadline_whatever_order_they_are_made_in() -> None:
    async def scenario() -> None:
        talk = conversation()
        ended: list[float] = []

        async def call(timeout_s: float) -> None:
            with pytest.raises(DeadlineExceeded, match=f"did not answer GetStatus within {timeout_s:g} s"):
                await talk.call(GetStatus(), timeout_s)
            ended.append(timeout_s)

        answered = asyncio.create_task(talk.call(GetStatus(), 0.01))
        await asyncio.sleep(0)
        talk.take(Envelope(Ok(), 1, True))
        assert await answered == Ok()
        unanswered = asyncio.create_task(talk.call(GetStatus(), 60))
        async with asyncio.timeout(10):
            await asyncio.gather(*(call(timeout_s) for timeout_s in (0.3, 0.1, 0.2, 0)))
        assert ended == [0, 0.1, 0.2, 0.3]
        assert not unanswered.done()
        talk.close(ConnectionLost("closed"))
        with pytest.raises(ConnectionLost, match="closed"):
            await unanswered

    run(scenario())
