"""The client for synchronous code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from slime_async.protocol import Commit, Deliver, Delivered, GetStatus, Heartbeat, Hello, Lease, NotReady, Ok
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.errors import ConnectionLost, DeadlineExceeded, RemoteError
from tests.transport.transport_kit import Hub, Inbox, a_hub, eventually, run, trajectory


@contextmanager
def connected(hub: Hub, inbox: Inbox) -> Iterator[BlockingClient]:
    with BlockingClient(hub.server.address, Hello("learner", "l"), handler=inbox, timeout_s=10) as client:
        yield client


def beside_a_hub(use: Callable[[Hub], None]) -> Hub:
    """Run ``use`` in a thread of its own, as the learner's main thread, while the hub runs in this one."""

    async def scenario() -> Hub:
        async with a_hub() as hub:
            await asyncio.to_thread(use, hub)
            return hub

    return run(scenario())


def test_calls_notes_and_reports_go_out() -> None:
    def use(hub: Hub) -> None:
        with connected(hub, Inbox()) as client:
            client.set_report({"loss": 0.5})
            assert client.welcome.run_id == "run"
            assert client.call(Deliver(trajectory()), 10) == Delivered("accepted")
            client.note(NotReady("out"))
            begun = [client.begin(Deliver(trajectory()), 10) for _ in range(20)]
            assert [replying.result(10) for replying in begun] == [Delivered("accepted")] * 20
            client.check()
        assert "hub-client" not in [thread.name for thread in threading.enumerate()]

    hub = beside_a_hub(use)
    assert NotReady("out") in hub.notes
    assert hub.left == [("l", "it said goodbye")]


def test_errors_come_out_of_the_call() -> None:
    def use(hub: Hub) -> None:
        with connected(hub, Inbox()) as client:
            with pytest.raises(RemoteError, match="cannot commit -3"):
                client.call(Commit(1, -3), 10)
            with pytest.raises(DeadlineExceeded, match=r"did not answer Lease within 0\.01 s"):
                client.call(Lease(1, 1, 20), 0.01)

    beside_a_hub(use)


def test_a_lost_hub_surfaces_in_whatever_is_done_next() -> None:
    async def scenario() -> None:
        async with a_hub() as hub:
            client = await asyncio.to_thread(
                lambda: BlockingClient(hub.server.address, Hello("learner", "l"), handler=Inbox(), timeout_s=10)
            )
            waiting = asyncio.create_task(asyncio.to_thread(client.call, Lease(1, 1, 20), 20))
            await eventually(lambda: hub.calls)
            await hub.server.close()
            with pytest.raises(ConnectionLost, match="lost the hub"):
                await waiting
            await eventually(client._closed.done)
            uses: list[Callable[[], object]] = [
                client.check,
                lambda: client.call(GetStatus(), 1),
                lambda: client.begin(GetStatus(), 1),
                lambda: client.note(Heartbeat()),
                lambda: client.set_report({}),
            ]
            for use in uses:
                with pytest.raises(ConnectionLost, match="lost the hub"):
                    use()
            client.close()

    run(scenario())


def test_a_closed_client_says_so() -> None:
    def use(hub: Hub) -> None:
        with connected(hub, Inbox()) as client:
            assert client.call(GetStatus(), 10) == Ok()
        client.close()
        with pytest.raises(ConnectionLost, match="was closed"):
            client.call(GetStatus(), 10)

    beside_a_hub(use)


def test_a_hub_that_is_not_there_is_an_error_of_the_constructor_and_leaves_no_thread() -> None:
    with pytest.raises(ConnectionLost, match=r"no hub at tcp://127.0.0.1:9 within 0.1 s"):
        BlockingClient("tcp://127.0.0.1:9", Hello("learner", "l"), handler=Inbox(), timeout_s=0.1)
    assert "hub-client" not in [thread.name for thread in threading.enumerate()]
