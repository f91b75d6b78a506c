"""A hub that is restarted within the clients' patience."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from slime_async.protocol import Commit, GetStatus, Heartbeat, Hello, Lease, NotReady, Ok, Shutdown
from slime_async.transport.codec import DEFAULT_LIMITS
from slime_async.transport.errors import ConnectionLost, RemoteError
from slime_async.transport.link import Link
from tests.transport.transport_kit import Hub, a_client, a_hub, eventually, run


def test_a_restarted_hub_gets_a_fresh_hello_and_the_unanswered_calls_again() -> None:
    async def scenario() -> None:
        first = Hub()
        await first.server.start()
        address = first.server.address
        again = Hello("actor", "a", slots=9)
        options = {"reconnect_s": 20.0, "refreshed_hello": lambda: again}
        async with a_client(address, **options) as (client, inbox):
            kept = asyncio.create_task(client.call(Lease(1, 4, 20), 20, retry=True))
            failed = asyncio.create_task(client.call(Lease(1, 5, 20), 20))
            await eventually(lambda: len(first.calls) == 2)
            await first.server.close()
            with pytest.raises(ConnectionLost, match="lost the hub"):
                await failed
            with pytest.raises(ConnectionLost, match="not connected now"):
                await client.note(Heartbeat())
            made_meanwhile = asyncio.create_task(client.call(GetStatus(), 20))
            async with a_hub(address) as second:
                assert await made_meanwhile == Ok()
                assert second.joined == [again]
                assert second.calls == [Lease(1, 4, 20), GetStatus()]
                second.gate.set()
                assert await kept == NotReady("the gate was opened")
                await second.server.note("a", Shutdown("enough"))
                await eventually(lambda: inbox.messages == [Shutdown("enough")])
                await client.close()
                await client.wait_closed()

    run(scenario())


def test_a_hub_that_does_not_come_back_in_time_ends_the_client() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address, reconnect_s=0.2) as (client, _):
            lease = asyncio.create_task(client.call(Lease(1, 4, 20), 20, retry=True))
            await eventually(lambda: hub.calls)
            await hub.server.close()
            with pytest.raises(ConnectionLost, match=r"it did not come back within 0.2 s"):
                await client.wait_closed()
            with pytest.raises(ConnectionLost, match=r"it did not come back"):
                await lease

    run(scenario())


def test_a_peer_that_the_hub_gave_up_comes_back_as_a_new_one() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address, reconnect_s=20.0) as (client, _):
            hub.server._leave(hub.server.peers["a"], "a test says so")
            await eventually(lambda: len(hub.joined) == 2)
            assert await client.call(GetStatus(), 10, retry=True) == Ok()
            assert hub.left == [("a", "a test says so")]

    run(scenario())


def test_a_client_that_is_closed_while_it_reconnects_ends_quietly() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address, reconnect_s=20.0) as (client, _):
            await hub.server.close()
            waiting = asyncio.create_task(client.call(GetStatus(), 20, retry=True))
            await eventually(lambda: client._talk.suspended)
            await client.close()
            with pytest.raises(ConnectionLost, match="was closed"):
                await waiting
            await client.wait_closed()

    run(scenario())


def test_an_error_reply_is_an_answer_and_is_not_repeated() -> None:
    async def scenario() -> None:
        async with a_hub() as hub, a_client(hub.server.address, reconnect_s=20.0) as (client, _):
            with pytest.raises(RemoteError, match="cannot commit -1"):
                await client.call(Commit(1, -1), 10, retry=True)
            assert hub.calls == [Commit(1, -1)]

    run(scenario())


def test_a_link_ends_its_monitor_before_it_stops_listening_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round, an event between the two leaves ZeroMQ's thread waiting, and the process with it."""
    listening = []
    disable = zmq.Socket.disable_monitor

    async def scenario() -> None:
        def nothing(*_: object) -> None: ...

        def spy(socket: zmq.Socket[bytes]) -> None:
            listening.append(not link.monitor.socket.closed)
            disable(socket)

        monkeypatch.setattr(zmq.Socket, "disable_monitor", spy)
        with zmq.Context() as context:
            link = Link(context, "tcp://127.0.0.1:9", DEFAULT_LIMITS, None, nothing, nothing, nothing, nothing)
            link.close()
            link.close()

    run(scenario())
    assert listening == [True]
