from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq
import zmq.asyncio

from slime_async.protocol import (
    Commit,
    ErrorReply,
    Finish,
    GetStatus,
    Heartbeat,
    Hello,
    Message,
    Ok,
    PauseEngine,
    Shutdown,
    Welcome,
)
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.client import HubClient
from slime_async.transport.codec import decode, encode
from slime_async.transport.errors import ConnectionLost, DeadlineExceeded, RemoteError
from slime_async.transport.server import MAX_BAD_MESSAGES, Server
from tests.transport.streams import DEADLINE_S, Answering, answering, joined, nothing, peer_process, run

FLOOD = 5000
PAUSE = PauseEngine("engine", "in_place")


# ----------------------------------------------------------------------------------------------------- calls, notes


def test_calls_are_answered_and_notes_arrive_in_order() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "a") as client:
            assert client.welcome == Welcome("run", 0.1, 5.0, 3)
            for i in range(100):
                await client.note(Commit(1, i))
            assert await client.call(Finish("hi"), 5) == Finish("a: hi")
            assert hub.notes == [Commit(1, i) for i in range(100)]

    run(test())


def test_the_hub_calls_its_peers_too() -> None:
    async def obey(message: Message) -> Message:
        if message != PAUSE:
            raise ValueError("this is nothing that I do")
        return Ok()

    async def test() -> None:
        async with answering() as hub, joined(hub, "a", obey):
            assert await hub.server.call("a", PAUSE, 5) == Ok()
            with pytest.raises(RemoteError, match=r"^ValueError: this is nothing that I do$"):
                await hub.server.call("a", Commit(0, 0), 5)
            with pytest.raises(ConnectionLost, match="nobody called b"):
                await hub.server.call("b", PAUSE, 5)

    run(test())


def test_an_error_at_the_other_side_arrives_with_its_class_and_its_text() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "a") as client:
            with pytest.raises(RemoteError) as caught:
                await client.call(Finish("fail"), 5)
            assert (caught.value.code, caught.value.message) == ("LookupError", "no such thing")

    run(test())


def test_a_call_without_an_answer_is_told_so() -> None:
    async def take(message: Message) -> None:
        return None

    async def test() -> None:
        async with answering() as hub, joined(hub, "a", take):
            with pytest.raises(RemoteError, match="PauseEngine is no call"):
                await hub.server.call("a", PAUSE, 5)

    run(test())


def test_a_long_call_blocks_no_other() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "a") as client:
            long = asyncio.create_task(client.call(Finish("wait"), 10))
            assert await hub.calls.get() == Finish("wait")
            assert await client.call(Finish("short"), 5) == Finish("a: short")
            assert not long.done()
            hub.gate.set()
            assert await long == Ok()

    run(test())


def test_a_missed_deadline_names_the_call_the_peer_and_the_time() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "a") as client:
            with pytest.raises(DeadlineExceeded, match=r"Finish to the hub at tcp://.* had no reply within 0.05 s"):
                await client.call(Finish("wait"), 0.05)
            hub.gate.set()  # the late reply goes unread
            assert await client.call(Finish("hi"), 5) == Finish("a: hi")

    run(test())


def test_a_value_that_cannot_be_sent_hurts_only_its_sender() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "a") as client:
            with pytest.raises(ValueError, match="cannot be sent"):
                await client.call(Commit(2**70, 0), 5)
            assert await client.call(Finish("hi"), 5) == Finish("a: hi")

    run(test())


def test_a_report_travels_with_the_heartbeats() -> None:
    async def test() -> None:
        async with answering(interval_s=0.02) as hub, joined(hub, "a") as client:
            client.set_report({"tokens": 5})
            while hub.server.peers["a"].report != {"tokens": 5}:
                await asyncio.sleep(0.01)

    run(test())


# ------------------------------------------------------------------------------------------------- life and death


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL])
def test_a_peer_that_falls_silent_is_dropped_and_its_calls_fail_at_once(end: signal.Signals) -> None:
    async def test() -> None:
        async with answering(0.05, 0.5) as hub, peer_process(hub, "actor-0") as process:
            call = asyncio.create_task(hub.server.call("actor-0", PAUSE, DEADLINE_S * 5))
            process.send_signal(end)
            with pytest.raises(ConnectionLost, match=r"actor actor-0 is gone: (silent for|its connection)"):
                await call
            assert (await hub.left.get())[0] == "actor-0"
            assert "actor-0" not in hub.server.peers
            with pytest.raises(ConnectionLost, match="nobody called actor-0"):
                await hub.server.call("actor-0", PAUSE, DEADLINE_S * 5)

    run(test())


def test_a_peer_that_was_taken_for_dead_learns_it() -> None:
    async def test() -> None:
        async with answering(0.05, 0.4) as hub, peer_process(hub, "actor-0") as process:
            process.send_signal(signal.SIGSTOP)
            await hub.left.get()
            process.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(process.wait, DEADLINE_S) == 1  # its connection was lost

    run(test())


def test_the_hubs_silence_ends_the_client() -> None:
    async def test() -> None:
        async with answering(60.0, 60.0) as hub:  # beats once a minute
            hub.welcome = Welcome("run", 0.05, 0.3, 0)
            client = await HubClient.connect(hub.server.address, Hello("observer", "a"), handler=nothing)
            waiting = asyncio.create_task(client.call(Finish("wait"), DEADLINE_S * 5))
            await hub.calls.get()
            with pytest.raises(ConnectionLost, match="has been silent for"):
                await client.wait_closed()
            with pytest.raises(ConnectionLost, match="has been silent for"):
                await waiting
            with pytest.raises(ConnectionLost, match=r"Finish to the hub.*silent"):
                await client.call(Finish("later"), DEADLINE_S * 5)
            await client.close()

    run(test())


def test_a_goodbye_is_no_loss() -> None:
    async def test() -> None:
        async with answering() as hub:
            async with joined(hub, "a"):
                pass
            assert await hub.left.get() == ("a", "it said goodbye")
            async with joined(hub, "a") as again:  # the name is free again
                assert await again.call(Finish("hi"), 5) == Finish("a: hi")

    run(test())


def test_a_handler_of_notes_that_fails_ends_its_own_connection() -> None:
    async def fail(message: Message) -> None:
        raise LookupError(f"cannot take {type(message).__name__}")

    async def test() -> None:
        async with answering() as hub:
            client = await HubClient.connect(hub.server.address, Hello("observer", "a"), handler=fail)
            await hub.server.note("a", Shutdown("over"))
            with pytest.raises(LookupError, match="cannot take Shutdown"):
                await client.wait_closed()
            with pytest.raises(ConnectionLost, match="cannot take Shutdown"):
                await client.call(Finish("hi"), 5)
            await client.close()

    run(test())


def test_nobody_at_the_address_is_said_to_be_so() -> None:
    async def test() -> None:
        with pytest.raises(ConnectionLost, match=r"no hub answered at tcp://127.0.0.1:9 within 0.1 s: is it running"):
            await HubClient.connect("tcp://127.0.0.1:9", Hello("observer", "a"), handler=nothing, timeout_s=0.1)

    run(test())


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_second_peer_of_the_same_name_is_refused() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "a") as first:
            with pytest.raises(RemoteError, match="observer called a is connected already"):
                await HubClient.connect(hub.server.address, Hello("actor", "a"), handler=nothing)
            assert await first.call(Finish("hi"), 5) == Finish("a: hi")

    run(test())


def test_a_refused_peer_reads_why_and_may_come_again() -> None:
    async def test() -> None:
        async with answering() as hub:
            with pytest.raises(RemoteError, match="13 slots bring bad luck: use 12"):
                await HubClient.connect(hub.server.address, Hello("actor", "a", slots=13), handler=nothing)
            assert not hub.server.peers
            async with joined(hub, "a"):
                assert list(hub.server.peers) == ["a"]

    run(test())


@contextmanager
def raw_socket(hub: Answering) -> Iterator[zmq.asyncio.Socket]:
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.connect(hub.server.address)
    try:
        yield socket
    finally:
        socket.close(linger=0)


async def reply_on(socket: zmq.asyncio.Socket) -> tuple[Message, int]:
    """The next message that is no heartbeat, and its call's id."""
    while True:
        message, call_id, _ = decode(await socket.recv_multipart())
        if not isinstance(message, Heartbeat):
            return message, call_id


@pytest.mark.parametrize("call_id", [0, 5])
def test_whoever_speaks_before_hello_is_told_to_say_it(call_id: int) -> None:
    async def test() -> None:
        async with answering() as hub:
            with raw_socket(hub) as socket:
                await socket.send_multipart(encode(Commit(1, 1), call_id=call_id))
                reply, answered = await reply_on(socket)
                assert reply == ErrorReply("ConnectionLost", "say Hello before Commit: this hub does not know you")
                assert answered == call_id

    run(test())


def test_a_connection_is_one_peer_whatever_names_it_gives() -> None:
    async def test() -> None:
        async with answering() as hub:
            with raw_socket(hub) as socket:
                for call_id, name in enumerate("ab", 1):
                    await socket.send_multipart(encode(Hello("actor", name), call_id=call_id))
                replies = [await reply_on(socket), await reply_on(socket)]
                assert sorted((call_id, type(reply)) for reply, call_id in replies) == [(1, Welcome), (2, ErrorReply)]
                assert list(hub.server.peers) == ["a"]

    run(test())


def test_a_note_that_the_hub_does_not_take_is_the_senders_fault() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "good") as good:
            with raw_socket(hub) as socket:
                await socket.send_multipart(encode(Hello("actor", "a"), call_id=1))
                await reply_on(socket)
                await socket.send_multipart(encode(GetStatus()))
                reply, _ = await reply_on(socket)
                assert isinstance(reply, ErrorReply)
                assert "GetStatus is no note" in reply.message
            assert await good.call(Finish("hi"), 5) == Finish("good: hi")

    run(test())


def test_garbage_is_answered_and_counted_and_its_connection_cut_while_others_go_on() -> None:
    async def test() -> None:
        async with answering() as hub, joined(hub, "good") as good:
            with raw_socket(hub) as socket:
                await socket.send_multipart(encode(Hello("actor", "bad"), call_id=1))
                assert isinstance((await reply_on(socket))[0], Welcome)
                for i in range(MAX_BAD_MESSAGES):
                    await socket.send_multipart([b"\xc1 garbage", bytes([i])])
                    reply, _ = await reply_on(socket)
                    assert isinstance(reply, ErrorReply)
                    assert reply.code == "BadMessage"
                    assert await good.call(Finish("hi"), 5) == Finish("good: hi")
                assert await hub.left.get() == ("bad", "it sent too many bad messages")
                await socket.send_multipart(encode(Hello("actor", "bad"), call_id=2))
                while not hub.server.counters["ignored_messages"]:
                    await asyncio.sleep(0.005)
            assert hub.server.counters["bad_messages"] == MAX_BAD_MESSAGES
            assert hub.server.counters["connections_cut"] == 1
            assert list(hub.server.peers) == ["good"]

    run(test())


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:5555", "tcp://10.0.0.1:5555"])
def test_addresses_that_others_can_reach_need_the_word_insecure(address: str) -> None:
    async def refuse(*_: object) -> Message:
        raise AssertionError

    with pytest.raises(ValueError, match=f"{address.replace('*', '.')}.*hub.insecure = true"):
        Server(address, on_call=refuse, on_note=refuse, on_join=refuse, on_leave=refuse)  # type: ignore[arg-type]


def test_an_address_in_use_is_refused_by_name() -> None:
    async def test() -> None:
        async with answering() as hub:
            other = Answering(1, 10).server
            other.address = hub.server.address
            with pytest.raises(ValueError, match=r"hub.address = 'tcp://127.0.0.1:\d+' cannot be bound"):
                await other.start()

    run(test())


# ----------------------------------------------------------------------------------------------------- backpressure


def test_a_flood_to_a_slow_peer_loses_nothing_and_delays_nobody_else() -> None:
    async def test() -> None:
        begin, received, text = asyncio.Event(), [], "x" * 24_000  # more than all buffers of sockets and kernel hold

        async def slowly(message: Message) -> None:
            await begin.wait()
            assert isinstance(message, Shutdown)
            received.append(int(message.reason.split()[0]))

        async with answering() as hub, joined(hub, "slow", slowly), joined(hub, "quick") as quick:

            async def flood() -> None:
                for i in range(FLOOD):
                    await hub.server.note("slow", Shutdown(f"{i} {text}"))

            flooding = asyncio.create_task(flood())
            outbox = hub.server.peers["slow"].outbox
            while not (hub.server.counters["full_buffers"] and outbox.full()):
                assert await quick.call(Finish("hi"), 5) == Finish("quick: hi")
            assert not flooding.done()  # the sender waits
            assert not hub.server.note_nowait("slow", Ok())
            begin.set()
            await flooding
            while len(received) < FLOOD:
                assert await quick.call(Finish("hi"), 5) == Finish("quick: hi")
            assert received == list(range(FLOOD))

    run(test())


def test_a_peer_whose_buffers_stay_full_is_dropped_and_its_sender_freed() -> None:
    async def test() -> None:
        async def stuck(message: Message) -> None:
            await asyncio.Event().wait()

        async with answering(0.05, 0.4) as hub, joined(hub, "stuck", stuck):
            while "stuck" in hub.server.peers:
                await hub.server.note("stuck", Shutdown("x" * 65536))
            assert (await hub.left.get())[0] == "stuck"

    run(test())


# ------------------------------------------------------------------------------------------------ from plain threads


@contextmanager
def hub_in_a_thread(timeout_s: float = 5.0) -> Iterator[tuple[Answering, asyncio.AbstractEventLoop, asyncio.Event]]:
    """A hub that lives until its event is set."""
    started: list[tuple[Answering, asyncio.AbstractEventLoop, asyncio.Event]] = []
    ready = threading.Event()

    async def main() -> None:
        async with answering(0.05, timeout_s) as hub:
            over = asyncio.Event()
            started.append((hub, asyncio.get_running_loop(), over))
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: run(main()), daemon=True)
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield started[0]
    finally:
        if thread.is_alive():
            started[0][1].call_soon_threadsafe(started[0][2].set)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def test_a_blocking_client_calls_from_any_thread() -> None:
    with hub_in_a_thread() as (hub, _, _):
        client = BlockingClient.connect(hub.server.address, Hello("learner", "l"), handler=nothing)
        assert client.welcome.run_id == "run"
        assert client.call(Finish("hi"), 5) == Finish("l: hi")
        futures = [client.begin(Finish(str(i)), 5) for i in range(20)]
        assert [f.result(5) for f in futures] == [Finish(f"l: {i}") for i in range(20)]
        client.check()
        client.close()
        client.close()
        client.check()
        with pytest.raises(ConnectionLost, match="was closed"):
            client.call(Finish("hi"), 5)


def test_a_refused_blocking_client_raises_the_reason_and_leaves_no_thread() -> None:
    with hub_in_a_thread() as (hub, _, _):
        with pytest.raises(RemoteError, match="13 slots"):
            BlockingClient.connect(hub.server.address, Hello("actor", "a", slots=13), handler=nothing)
        assert "hub connection" not in {thread.name for thread in threading.enumerate()}


def test_the_death_of_a_blocking_client_surfaces_in_check_and_in_calls() -> None:
    with hub_in_a_thread(timeout_s=0.3) as (hub, loop, over):
        client = BlockingClient.connect(hub.server.address, Hello("learner", "l"), handler=nothing)
        open_call = client.begin(Finish("wait"), DEADLINE_S * 5)
        loop.call_soon_threadsafe(over.set)
        with pytest.raises(ConnectionLost, match="silent"):
            open_call.result(DEADLINE_S)
        assert client._ended is not None
        with pytest.raises(ConnectionLost, match="silent"):
            client._ended.result(DEADLINE_S)
        with pytest.raises(ConnectionLost, match="silent"):
            client.check()
        with pytest.raises(ConnectionLost, match="silent"):
            client.call(Finish("hi"), DEADLINE_S * 5)
        client.close()
