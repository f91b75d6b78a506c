"""How rank 0's publisher has the other source ranks send their parts: one connection to each, orders by number.

::

    rank 0, publisher's thread       another source: reader           its worker              its training loop
    fill(v)       ────────────────►  v's buffers are free  ───────────────────────────────────► fills v
    host(name, epoch, worlds) ────►  queue ───────────────► stores ── specs ──► rank 0
    join()        ────────────────►  queue ───────────────► WeightGroup.create ── done ──► rank 0
    send(v)       ────────────────►  queue ───────────────► broadcasts what is filled ── done ──► rank 0
    leave()       ────────────────►  gives up a send ─────► closes the groups ── done ──► rank 0

A line is one JSON object. Whoever connects says a token that rank 0 told all ranks by the learner's own process group.
A source whose process ends closes its connection: rank 0 knows at once. One that hangs is noticed at the deadline. Both
are ``SourceLost``, which no new attempt mends: the learner has lost a rank. A source that could not send says so, and
the publisher tries again with fresh groups.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from slime_async.learner.group_source import GroupSource
from slime_async.learner.snapshots import Snapshot
from slime_async.learner.sources import Division
from slime_async.protocol import WeightGroupSpec, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.threads import in_daemon_thread
from slime_async.transport.weight_group import WeightGroupError, listen

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 60.0
"""For all source ranks to connect to rank 0, once every one of them knows its port"""
LINE_BYTES = 1 << 20
"""More than any order or answer has; a longer line is no peer of ours"""


class SourceLost(RuntimeError):
    """A rank of the learner that sends a part of the weights is gone, or does not answer."""


class Connection:
    """Lines of JSON over a socket. Any thread may send, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._lines = sock.makefile("rb")
        self._sending = threading.Lock()

    def send(self, line: dict[str, Any]) -> None:
        with self._sending:
            self._socket.sendall(json.dumps(line).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """None: the other side is gone, or no peer of ours."""
        try:
            received: dict[str, Any] = json.loads(self._lines.readline(LINE_BYTES))
        except (OSError, ValueError):
            return None
        return received

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        self._socket.close()


class OtherSource:
    """Rank 0's line to one other source."""

    def __init__(self, rank: int, part: WeightManifest, connection: Connection) -> None:
        self.rank = rank
        self.part = part
        """What it sends"""
        self._connection = connection
        self._lock = threading.Lock()
        self._asked = 0
        self._open: dict[int, Future[dict[str, Any]]] = {}
        self._lost = False
        in_daemon_thread(self._receive, f"source-{rank}")

    def host(self, name: str, epoch: int, world_sizes: Sequence[int]) -> Future[dict[str, Any]]:
        return self._ask({"do": "host", "name": name, "epoch": epoch, "worlds": list(world_sizes)})

    def join(self) -> Future[dict[str, Any]]:
        return self._ask({"do": "join"})

    def send(self, weights: WeightId, *, whole_buffers: bool) -> Future[dict[str, Any]]:
        return self._ask({"do": "send", "weights": list(weights), "whole_buffers": whole_buffers})

    def leave(self) -> Future[dict[str, Any]]:
        return self._ask({"do": "leave"})

    def queued(self, weights: WeightId) -> Future[dict[str, Any]]:
        """Done when its part is converted, on CUDA at least queued."""
        return self._ask({"do": "queued", "weights": list(weights)})

    def fill(self, weights: WeightId) -> None:
        """The publisher has taken the weights before these: these may be written over the ones before those."""
        self._ask({"do": "fill", "weights": list(weights)})

    def answer(self, asked: Future[dict[str, Any]], timeout_s: float) -> dict[str, Any]:
        """Raises ``WeightGroupError`` with what the source says went wrong, ``SourceLost`` when it says nothing."""
        try:
            return asked.result(timeout_s)
        except TimeoutError:
            raise SourceLost(f"{self._name} did not answer within {timeout_s:g} s") from None

    def close(self) -> None:
        self._connection.close()

    @property
    def _name(self) -> str:
        return f"rank {self.rank} of the learner, which sends {len(self.part.tensors)} tensors,"

    def _ask(self, order: dict[str, Any]) -> Future[dict[str, Any]]:
        asked: Future[dict[str, Any]] = Future()
        with self._lock:
            self._asked += 1
            number, lost = self._asked, self._lost
            self._open[number] = asked
        try:
            if not lost:
                self._connection.send({"number": number, **order})
        except OSError:
            lost = True
        if lost:
            self._fail_open()
        return asked

    def _receive(self) -> None:
        while (answer := self._connection.receive()) is not None:
            with self._lock:
                asked = self._open.pop(answer["number"])
            if problem := answer.get("error"):
                asked.set_exception(WeightGroupError(f"rank {self.rank} of the learner: {problem}"))
            else:
                asked.set_result(answer)
        self._fail_open()

    def _fail_open(self) -> None:
        with self._lock:
            self._lost = True
            unanswered, self._open = list(self._open.values()), {}
        for asked in unanswered:
            asked.set_exception(SourceLost(f"{self._name} is gone"))


class SourceRank:
    """Every source but rank 0: obeys orders on threads of its own, beside the training loop."""

    def __init__(self, connection: Connection, source: GroupSource, timeout_s: float) -> None:
        self._connection = connection
        self._source = source
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._snapshots: dict[WeightId, Snapshot] = {}
        self._free: WeightId | None = None
        self._lost = False
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._given_up: Future[None] = Future()
        in_daemon_thread(self._read, "orders")
        in_daemon_thread(self._work, "source")

    # ------------------------------------------------------------------------------------- the training loop's side

    def wait_free(self, weights: WeightId, timeout_s: float) -> float:
        """Until rank 0 has a place for these weights; returns the seconds that took. Then ``publish`` and fill."""
        begun = time.monotonic()
        with self._changed:
            told = self._changed.wait_for(lambda: self._free == weights or self._lost, timeout_s)
        if self._lost:
            raise SourceLost("rank 0 of the learner, which publishes, is gone")
        if not told:
            raise TimeoutError(f"waited {timeout_s:.0f} s for rank 0 to publish version {weights.version}")
        return time.monotonic() - begun

    def publish(self, snapshot: Snapshot) -> None:
        """To be sent as soon as rank 0 says so, while it is being filled; the one before may still be asked for."""
        with self._changed:
            kept = list(self._snapshots.items())[-1:]
            self._snapshots = dict([*kept, (snapshot.weights, snapshot)])
            self._changed.notify_all()

    def close(self) -> None:
        self._connection.close()
        self._source.leave()

    # --------------------------------------------------------------------------------------------- the threads' side

    def _read(self) -> None:
        while (order := self._connection.receive()) is not None:
            if order["do"] == "fill":
                with self._changed:
                    self._free = WeightId(*order["weights"])
                    self._changed.notify_all()
            elif order["do"] == "leave" and not self._given_up.done():
                self._given_up.set_exception(WeightGroupError("rank 0 gave the publication up"))
            self._orders.put(order)
        with self._changed:
            self._lost = True
            self._changed.notify_all()
        self._orders.put(None)

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            answer: dict[str, Any] = {"number": order["number"]}
            try:
                answer["specs"] = [asdict(spec) for spec in self._obey(order)]
            except Exception as error:  # noqa: BLE001 - the border of a process: rank 0 decides what becomes of it
                log.warning("%s failed: %s", order["do"], error)
                answer["error"] = f"{type(error).__name__}: {error}"
            with suppress(OSError):
                self._connection.send(answer)
        self._source.leave()

    def _obey(self, order: dict[str, Any]) -> list[WeightGroupSpec]:
        match order["do"]:
            case "host":
                return self._source.host(order["name"], order["epoch"], order["worlds"])
            case "join":
                self._source.join()
            case "queued":
                self._snapshot(WeightId(*order["weights"])).wait_queued(self._timeout_s)
            case "send":
                snapshot = self._snapshot(WeightId(*order["weights"]))
                self._source.send(snapshot, [self._given_up], whole_buffers=order["whole_buffers"])
            case "leave":
                self._source.leave()
                self._given_up = Future()
        return []

    def _snapshot(self, weights: WeightId) -> Snapshot:
        with self._changed:
            if not self._changed.wait_for(lambda: weights in self._snapshots or self._lost, self._timeout_s):
                raise TimeoutError(f"version {weights.version} was not published here within {self._timeout_s:g} s")
            return self._snapshots[weights]


def meet(
    division: Division, source: GroupSource | None, timeout_s: float, device: torch.device
) -> list[OtherSource] | SourceRank | None:
    """All ranks: connect every source to rank 0. A collective.

    ``source`` is this rank's end of the groups, None at rank 0 (whose carrier has its own) and where nothing is sent.
    Returns the other sources at rank 0, the ``SourceRank`` at those, and None at ranks that send nothing.
    """
    rank, others = dist.get_rank(), [rank for rank in division.parts if rank]
    told = torch.zeros(2, dtype=torch.int64, device=device)
    if rank:
        dist.broadcast(told, src=0)
        if source is None:
            return None
        port, token = told.tolist()
        address = os.environ.get("MASTER_ADDR", "127.0.0.1"), port
        sock = socket.create_connection(address, CONNECT_TIMEOUT_S)
        sock.settimeout(None)
        connection = Connection(sock)
        connection.send({"rank": rank, "token": token})
        return SourceRank(connection, source, timeout_s)
    with listen() as listener:
        token = secrets.randbits(62)
        told[0], told[1] = listener.getsockname()[1], token
        dist.broadcast(told, src=0)
        found = _accept(listener, others, token)
    return [OtherSource(rank, division.parts[rank], found[rank]) for rank in others]


def _accept(listener: socket.socket, ranks: Sequence[int], token: int) -> dict[int, Connection]:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    found: dict[int, Connection] = {}
    while missing := [rank for rank in ranks if rank not in found]:
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            sock, peer = listener.accept()
        except TimeoutError:
            raise SourceLost(f"ranks {missing} of the learner did not connect within {CONNECT_TIMEOUT_S:g} s") from None
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        connection = Connection(sock)
        hello = connection.receive() or {}
        sock.settimeout(None)
        if hello.get("token") == token and hello.get("rank") in missing:
            found[hello["rank"]] = connection
        else:
            log.warning("somebody at %s connected who is no source rank of this learner", peer)
            connection.close()
    return found
