"""Five ways to move trajectories from one process to another: our streams and what one would use instead.

In every way the receiver acknowledges each trajectory, the sender has at most ``window`` of them unacknowledged, and
the receiver ends with arrays that can be computed with. Raw pyzmq gets the socket options of our streams (high-water
marks, one DEALER, one ROUTER, large frames borrowed) and the bytes of a trajectory in one piece that was made
beforehand, behind a frame in the place of a header; as "raw, arrays", its arrays, a frame each. It has neither codec
nor checks nor event loop.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from socketserver import TCPServer
from typing import Any, NamedTuple

import numpy as np
import uvloop
import zmq

from slime_async.protocol import Deliver, Delivered, Hello, Message, Welcome
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId
from slime_async.transport.buffers import BORROW_FROM_BYTES, size_of
from slime_async.transport.client import HubClient
from slime_async.transport.codec import DEFAULT_LIMITS
from slime_async.transport.memory import keep_freed_memory
from slime_async.transport.security import (
    ClientSecurity,
    ServerSecurity,
    generate,
    load,
    load_public,
    secure_client,
)
from slime_async.transport.server import Peer, Server
from slime_async.transport.stream import new_socket

SPAWN = multiprocessing.get_context("spawn")
WAIT_S = 60.0
START_S = 60.0
"""For a process to import what it needs and to connect"""
TOKEN_BYTES = 9
"""Of a plain trajectory: an id, a mask entry and a log-probability"""
PLAIN_BYTES = 256 << 10
"""Larger trajectories consist of a plain one of this size and routed experts, as those of MoE models do"""


def trajectory_of(size_bytes: int) -> Trajectory:
    """A trajectory whose arrays take ``size_bytes``, within a few."""
    tokens = min(size_bytes, PLAIN_BYTES) // TOKEN_BYTES
    rest = size_bytes - tokens * TOKEN_BYTES
    mask = np.ones(tokens, np.uint8)
    mask[:100] = 0
    return Trajectory(
        task=TaskRef(serial=3, source="benchmark", index=5),
        sample=1,
        attempt=0,
        token_ids=np.arange(tokens, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.linspace(-2, 0, tokens, dtype=np.float32),
        spans=(VersionSpan(100, WeightId(1, 7)), VersionSpan(tokens // 2, WeightId(1, 8))),
        reward=1.0,
        finish_reason="stop",
        extras={"routed_experts": np.arange(rest, dtype=np.uint8)} if rest > TOKEN_BYTES else {},
    )


def columns_of(trajectory: Trajectory) -> dict[str, np.ndarray[Any, Any]]:
    columns = ("token_ids", "loss_mask", "behavior_logprobs")
    return {name: getattr(trajectory, name) for name in columns} | trajectory.extras


def window_of(size_bytes: int) -> int:
    """Trajectories on their way: 16, but no more than 64 MiB."""
    return max(2, min(16, (64 << 20) // size_bytes))


class Slice(NamedTuple):
    """What one sender did in one go, from its first message to the last acknowledgement."""

    messages: int
    seconds: float
    cpu_s: float
    """Of both processes, their I/O threads included"""


class Way:
    """A receiver and a sender in processes of their own, idle between ``run`` s."""

    def __init__(self, receive: Callable[..., None], send: Callable[..., None], *shared: Any) -> None:
        self._processes: list[SpawnProcess] = []
        address = self._hear(self._start(receive, *shared), START_S)
        self._control = self._start(send, address, *shared)
        assert self._hear(self._control, START_S) == "ready"

    def run(self, size_bytes: int, seconds: float) -> Slice:
        before = self._cpu_s()
        self._control.send((size_bytes, seconds))
        messages, elapsed_s = self._hear(self._control, seconds + WAIT_S)
        return Slice(messages, elapsed_s, self._cpu_s() - before)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _start(self, work: Callable[..., None], *arguments: Any) -> Connection:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(
            target=as_ours_do, args=(work, theirs, *arguments), name=f"process of {work.__name__}", daemon=True
        )
        self._processes.append(process)
        process.start()
        theirs.close()  # the end of the process is then the end of the pipe
        return ours

    def _cpu_s(self) -> float:
        return sum(cpu_s(process.pid) for process in self._processes if process.pid)

    def _hear(self, pipe: Connection, timeout_s: float) -> Any:
        """What the latest process says next. Raises when one died, or says nothing in time."""
        deadline = time.monotonic() + timeout_s
        while not pipe.poll(1.0):
            if dead := [p for p in self._processes if not p.is_alive()]:
                raise RuntimeError(f"{dead[0].name} ended, exit code {dead[0].exitcode}: its traceback is above")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._processes[-1].name} said nothing within {timeout_s:g} s")
        try:
            return pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self._processes[-1].name} ended: its traceback is above") from None


def as_ours_do(work: Callable[..., None], *arguments: Any) -> None:
    """In a process that keeps freed memory, as those of the hub and of actors do."""
    keep_freed_memory()
    work(*arguments)


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process (Linux: its CPU clock's id, as clock_getcpuclockid(3) makes it)."""
    return time.clock_gettime((~pid << 3) | 2)


@contextmanager
def opened(*arguments: Any) -> Iterator[Way]:
    way = Way(*arguments)
    try:
        yield way
    finally:
        way.close()


# ------------------------------------------------------------------------------------------------ our streams


def keys_in(directory: Path | None) -> tuple[ServerSecurity | None, ClientSecurity | None]:
    if directory is None:
        return None, None
    hub, client = load(directory / "hub.key"), load(directory / "client.key")
    server = ServerSecurity(hub, directory / "authorized_keys")
    return server, ClientSecurity(client, load_public(directory / "hub.pub"))


def make_keys(directory: Path) -> None:
    generate(directory / "hub.key")
    (directory / "authorized_keys").write_text(generate(directory / "client.key").public + "\n")


def receive_ours(ready: Connection, keys: Path | None, _: int = 1) -> None:
    async def main() -> None:
        async def on_join(peer: Peer, hello: Hello) -> Welcome:
            return Welcome("run", 1.0, 10.0, 0)

        def on_call(peer: Peer, message: Message) -> Message:
            assert isinstance(message, Deliver)
            return Delivered("accepted")

        def on_note(peer: Peer, message: Message) -> None:
            raise ValueError("no notes here")

        server = Server(
            "tcp://127.0.0.1:0",
            on_call=on_call,
            on_note=on_note,
            on_join=on_join,
            on_leave=lambda peer, reason: None,
            security=keys_in(keys)[0],
        )
        await server.start()
        ready.send(server.address)
        await server.serve()

    uvloop.run(main())


def send_ours(control: Connection, address: str, keys: Path | None, connections: int = 1) -> None:
    async def nothing(_: Message) -> None:
        """The receiver sends none."""

    async def main() -> None:
        clients = [
            await HubClient.connect(address, Hello("actor", f"sender-{i}"), handler=nothing, security=keys_in(keys)[1])
            for i in range(connections)
        ]
        control.send("ready")
        while True:
            size_bytes, seconds = await asyncio.to_thread(control.recv)
            trajectory, sent = trajectory_of(size_bytes), 0
            begun = time.monotonic()

            async def deliver(client: HubClient, trajectory: Trajectory, until: float) -> None:
                nonlocal sent
                while time.monotonic() < until:
                    await client.call(Deliver(trajectory), WAIT_S)
                    sent += 1

            async with asyncio.TaskGroup() as tasks:
                for i in range(max(window_of(size_bytes), connections)):
                    tasks.create_task(deliver(clients[i % connections], trajectory, begun + seconds))
            control.send((sent, time.monotonic() - begun))

    uvloop.run(main())


# -------------------------------------------------------------------------------------------------- raw pyzmq


def receive_raw(ready: Connection, keys: Path | None, _: bool = False) -> None:
    socket = new_socket(zmq.Context(), zmq.ROUTER, DEFAULT_LIMITS)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # as ours: wait where replies find no room, which drops none
    if keys is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, load(keys / "hub.key").secret.encode())
    ready.send(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
    while True:
        identity, _header, *bodies = socket.recv_multipart(copy=False)
        for body in bodies:
            np.frombuffer(body.buffer, np.uint8)
        socket.send_multipart([identity.bytes, b"ok"])


def send_raw(control: Connection, address: str, keys: Path | None, apart: bool = False) -> None:
    """``apart``: each array is a frame of its own."""
    socket, poller = new_socket(zmq.Context(), zmq.DEALER, DEFAULT_LIMITS), zmq.Poller()
    if (security := keys_in(keys)[1]) is not None:
        secure_client(socket, security)
    socket.connect(address)
    poller.register(socket, zmq.POLLIN)
    control.send("ready")
    header = bytes(300)
    while True:
        size_bytes, seconds = control.recv()
        arrays = [array.data for array in columns_of(trajectory_of(size_bytes)).values()]
        *others, last = arrays if apart else [b"".join(arrays)]
        under_way = window_of(size_bytes)
        begun, sent = time.monotonic(), 0

        def send(last: bytes | memoryview, others: Sequence[bytes | memoryview]) -> None:
            socket.send(header, zmq.SNDMORE)
            for body in others:
                socket.send(body, zmq.SNDMORE, copy=size_of(body) < BORROW_FROM_BYTES, track=False)
            socket.send(last, copy=size_of(last) < BORROW_FROM_BYTES, track=False)

        for _ in range(under_way):
            send(last, others)
        while under_way:
            if not poller.poll(int(WAIT_S * 1000)):
                raise TimeoutError(f"{under_way} messages were not acknowledged within {WAIT_S:g} s")
            socket.recv_multipart()
            sent += 1
            if time.monotonic() < begun + seconds:
                send(last, others)
            else:
                under_way -= 1
        control.send((sent, time.monotonic() - begun))


# -------------------------------------------------------------------------------------------------- HTTP / JSON


def receive_http(ready: Connection) -> None:
    class LocalServer(HTTPServer):
        def server_bind(self) -> None:
            TCPServer.server_bind(self)  # HTTPServer's asks name servers for the host's name, and may wait for them

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for values in body["columns"].values():
                np.asarray(values)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = LocalServer(("127.0.0.1", 0), Handler)
    ready.send(server.server_address[1])
    server.serve_forever()


def send_http(control: Connection, port: int) -> None:
    """One at a time: with both ends in Python, several would only share one interpreter."""
    connection = HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    control.send("ready")
    while True:
        size_bytes, seconds = control.recv()
        columns = columns_of(trajectory_of(size_bytes))
        begun, sent = time.monotonic(), 0
        while time.monotonic() < begun + seconds:
            body = json.dumps({"columns": {name: array.tolist() for name, array in columns.items()}})
            connection.request("POST", "/deliver", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read() == b"{}"
            sent += 1
        control.send((sent, time.monotonic() - begun))


# --------------------------------------------------------------------------------- multiprocessing.Queue, pickle


def receive_queue(ready: Connection, there: Any, back: Any) -> None:
    ready.send("queue")
    while True:
        trajectory = there.get()
        assert isinstance(trajectory, Trajectory)
        back.put(None)


def send_queue(control: Connection, _: str, there: Any, back: Any) -> None:
    control.send("ready")
    while True:
        size_bytes, seconds = control.recv()
        trajectory, under_way = trajectory_of(size_bytes), window_of(size_bytes)
        begun, sent = time.monotonic(), 0
        for _ in range(under_way):
            there.put(trajectory)
        while under_way:
            back.get(timeout=WAIT_S)
            sent += 1
            if time.monotonic() < begun + seconds:
                there.put(trajectory)
            else:
                under_way -= 1
        control.send((sent, time.monotonic() - begun))
