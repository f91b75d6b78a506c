"""The parts of the hub's benchmark: who delivers, who leases, and raw pyzmq that moves the same bytes the same way.

Three processes in each case: one that sends trajectories over N connections, the hub (or a bare ROUTER), and one that
takes batches of B. Every trajectory crosses two sockets and is acknowledged to its sender.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import zmq

from slime_async.protocol import Batch, Commit, Deliver, Granted, Hello, Lease, Message, Published, Reservation
from slime_async.trajectory import Trajectory, VersionSpan, WeightId
from slime_async.transport.client import HubClient

WAIT_S = 60.0
SAMPLED = 64
"""Sampled tokens of a benchmark trajectory; the rest of its bytes is one optional column"""
SOURCES = {"train": 1 << 40}
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Rate:
    """What went through, from the first batch that was taken to the last."""

    trajectories: int
    seconds: float
    size_bytes: int

    @property
    def per_s(self) -> float:
        return self.trajectories / self.seconds

    @property
    def gbps(self) -> float:
        return self.per_s * self.size_bytes / 1e9


def trajectory_of(reservation: Reservation, payload: np.ndarray, version: int) -> Trajectory:
    ids = np.arange(SAMPLED, dtype=np.int32)
    return Trajectory(
        task=reservation.task,
        sample=reservation.sample,
        attempt=reservation.attempt,
        token_ids=ids,
        loss_mask=np.array([0] + [1] * (SAMPLED - 1), np.uint8),
        behavior_logprobs=np.zeros(SAMPLED, np.float32),
        spans=(VersionSpan(1, WeightId(1, version)),),
        reward=1.0,
        finish_reason="stop",
        extras={"payload": payload},
    )


# ------------------------------------------------------------------------------------------------------ the hub


async def deliver_for_ever(address: str, clients: int, size_bytes: int) -> None:
    """``clients`` actors in one loop; each delivers what it is granted at once."""
    import uvloop

    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
    payload = np.random.default_rng(0).integers(0, 255, size_bytes, dtype=np.uint8)

    async def actor(name: str) -> None:
        granted: asyncio.Queue[Reservation] = asyncio.Queue()

        async def handle(message: Message) -> None:
            if isinstance(message, Granted):
                for reservation in message.reservations:
                    granted.put_nowait(reservation)

        hello = Hello("actor", name, slots=max(1, 64 // clients), sources=SOURCES)
        client = await HubClient.connect(address, hello, handler=handle)

        async def deliver() -> None:
            while True:
                reservation = await granted.get()
                await client.call(Deliver(trajectory_of(reservation, payload, 0)), WAIT_S)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(client.wait_closed())
            for _ in range(max(1, 16 // clients)):
                tasks.create_task(deliver())

    async with asyncio.TaskGroup() as actors:
        for i in range(clients):
            actors.create_task(actor(f"actor-{i}"))


def sender(address: str, clients: int, size_bytes: int) -> None:
    import uvloop

    uvloop.run(deliver_for_ever(address, clients, size_bytes))


@contextmanager
def beside(target: object, *arguments: object) -> Iterator[None]:
    """A process that runs until it is not needed any more."""
    process = SPAWN.Process(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


async def take_batches(address: str, seconds: float, size_bytes: int, warm_up: int) -> Rate:
    """The learner: leases, commits and publishes, one batch after another."""

    async def handle(_: Message) -> None:
        """Members do not matter here."""

    client = await HubClient.connect(address, Hello("learner", "learner", incarnation=1), handler=handle)
    await client.call(Published(WeightId(1, 0)), WAIT_S)
    taken = version = 0
    begun = time.monotonic()
    while version < warm_up + 2 or time.monotonic() - begun < seconds:
        batch = await client.call(Lease(1, version, WAIT_S), WAIT_S)
        assert isinstance(batch, Batch), batch
        await client.call(Commit(1, version), WAIT_S)
        version += 1
        await client.call(Published(WeightId(1, version)), WAIT_S)
        if version == warm_up:
            begun, taken = time.monotonic(), 0
        else:
            taken += len(batch.trajectories)
    ended = time.monotonic()
    await client.close()
    return Rate(taken, ended - begun, size_bytes)


# -------------------------------------------------------------------------------------------------- raw pyzmq


def raw_router(port_for: object, batch: int) -> None:
    """A bare ROUTER: acknowledges what comes, and hands it on by ``batch`` to whoever asked."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port_for.put(router.bind_to_random_port("tcp://127.0.0.1"))  # type: ignore[attr-defined]
    held: list[list[zmq.Frame]] = []
    waiting: list[bytes] = []
    while True:
        identity, kind, *frames = router.recv_multipart(copy=False)
        if kind.bytes == b"batch":
            waiting.append(identity.bytes)
        else:
            router.send_multipart([identity.bytes, b"ok"])
            held.append(frames)
        while waiting and len(held) >= batch:
            ready, held = held[:batch], held[batch:]
            router.send_multipart([waiting.pop(0), *(frame for frames in ready for frame in frames)], copy=False)


def raw_sender(port: int, clients: int, size_bytes: int, most: int) -> None:
    """``clients`` sockets, ``most`` messages on their way in all."""
    context = zmq.Context()
    payload, header = bytes(size_bytes), bytes(300)
    sockets = []
    poller = zmq.Poller()
    for _ in range(clients):
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{port}")
        poller.register(socket, zmq.POLLIN)
        sockets.append(socket)
        for _ in range(max(1, most // clients)):
            socket.send_multipart([b"deliver", header, payload], copy=False)
    while True:
        for socket, _ in poller.poll():
            socket.recv_multipart()
            socket.send_multipart([b"deliver", header, payload], copy=False)


def raw_rate(clients: int, size_bytes: int, batch: int, seconds: float, warm_up: int) -> Rate:
    ports: multiprocessing.Queue[int] = SPAWN.Queue()
    with beside(raw_router, ports, batch):
        port = ports.get(timeout=WAIT_S)
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{port}")
        with beside(raw_sender, port, clients, size_bytes, 16):
            taken = batches = 0
            begun = time.monotonic()
            socket.send(b"batch")
            while batches < warm_up + 2 or time.monotonic() - begun < seconds:
                assert socket.poll(int(WAIT_S * 1000)), "raw pyzmq sent nothing"
                socket.recv_multipart(copy=False)
                socket.send(b"batch")
                batches += 1
                if batches == warm_up:
                    begun, taken = time.monotonic(), 0
                else:
                    taken += batch
            ended = time.monotonic()
        socket.close(0)
        context.term()
    return Rate(taken, ended - begun, size_bytes)
