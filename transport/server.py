"""The hub's end of all streams: one ROUTER socket, a ``Peer`` for each connection that said ``Hello``.

::

    socket ──► receive loop ──► calls: a task each, so that a long one blocks no other
                            └─► notes: in order, in the loop itself
    each peer: outbox (bounded) ──► its own sender task ──► socket

A peer whose buffers stay full for the heartbeat timeout is taken for dead; one that is silent for as long, too. Until
then senders to it wait; senders to others don't notice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio

from slime_async.protocol import ErrorReply, Goodbye, Heartbeat, Hello, Message, Report, Role, Welcome
from slime_async.transport.calls import PendingCalls, answer, configure, describe, views
from slime_async.transport.codec import DEFAULT_LIMITS, BadMessage, Envelope, Limits, decode, encode
from slime_async.transport.errors import ConnectionLost

log = logging.getLogger(__name__)

OUTBOX_MESSAGES = 256
"""Messages to one peer that wait for its socket; a sender waits when there are more."""
MAX_BAD_MESSAGES = 16
"""A connection that sent this many bad messages is heard no longer."""
RETRY_S = 0.002
"""Pause before a full socket buffer is tried again."""
LOOPBACK = ("127.", "localhost", "[::1]")


@dataclass(slots=True, eq=False)
class Peer:
    """One welcomed connection."""

    name: str
    role: Role
    identity: bytes
    calls: PendingCalls
    last_heard: float
    report: Report = field(default_factory=dict)
    outbox: asyncio.Queue[tuple[Message, int, bool]] = field(default_factory=lambda: asyncio.Queue(OUTBOX_MESSAGES))

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.last_heard


class Server:
    """Owns the socket and the peers. ``serve`` runs everything; whatever it raises ended it."""

    def __init__(
        self,
        address: str,
        *,
        on_call: Callable[[Peer, Message], Awaitable[Message]],
        on_note: Callable[[Peer, Message], Awaitable[None]],
        on_join: Callable[[Peer, Hello], Awaitable[Welcome]],
        on_leave: Callable[[Peer, str], Coroutine[Any, Any, None]],
        heartbeat_interval_s: float = 1.0,
        heartbeat_timeout_s: float = 10.0,
        insecure: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """``on_join`` refuses a peer, and ``on_note`` a note, by raising ``ValueError``, whose text the peer reads.

        Raises ``ValueError`` for an address beyond loopback that is not marked ``insecure``.
        """
        host = address.removeprefix("tcp://")
        if not insecure and not host.startswith(LOOPBACK):
            raise ValueError(
                f"hub.address = {address!r} is reachable from other machines, without authentication: use "
                "tcp://127.0.0.1:PORT, or set hub.insecure = true on a network where everybody is trusted"
            )
        self.address = address
        self.peers: dict[str, Peer] = {}
        self.counters: Counter[str] = Counter()
        self._on_call, self._on_note = on_call, on_note
        self._on_join, self._on_leave = on_join, on_leave
        self._interval_s, self._timeout_s = heartbeat_interval_s, heartbeat_timeout_s
        self._limits = limits
        self._by_identity: dict[bytes, Peer] = {}
        self._bad: Counter[bytes] = Counter()
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        configure(self._socket, limits.frame_bytes)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._tasks: asyncio.TaskGroup | None = None
        self._senders: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Bind. Raises ``ValueError`` when the address cannot be had."""
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ValueError(f"hub.address = {self.address!r} cannot be bound: {error}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def serve(self) -> None:
        """Until cancelled. A handler that raises what is no refusal has a bug, and ends this."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._receive(), name="receive")
            self._tasks.create_task(self._watch(), name="heartbeats")

    async def close(self) -> None:
        """Hand what is in the outboxes to the socket, which sends it within its linger time."""
        for peer in list(self.peers.values()):
            sender = self._senders.pop(peer.name, None)
            if sender is not None:
                sender.cancel()
            peer.calls.fail(ConnectionLost("the hub is closing"))
            while not peer.outbox.empty():
                message, call_id, reply = peer.outbox.get_nowait()
                try:
                    await self._socket.send_multipart(
                        [peer.identity, *encode(message, call_id=call_id, reply=reply)], zmq.NOBLOCK, copy=False
                    )
                except zmq.ZMQError as error:
                    log.warning("%s to %s is lost at closing: %s", type(message).__name__, peer.name, error)
                    break
        self.peers.clear()
        self._socket.close()

    # ------------------------------------------------------------------------------------------------- sending

    async def call(self, name: str, message: Message, timeout_s: float) -> Message:
        """Ask a peer. Raises ``ConnectionLost`` when there is none of that name, or when it leaves meanwhile."""
        peer = self._peer(name)
        return await peer.calls.call(lambda m, i, r: peer.outbox.put((m, i, r)), message, timeout_s)

    async def note(self, name: str, message: Message) -> None:
        """Tell a peer, waiting while its outbox is full; one that has just left is not told."""
        if (peer := self.peers.get(name)) is not None:
            await peer.outbox.put((message, 0, False))

    def note_nowait(self, name: str, message: Message) -> bool:
        """As ``note``, without waiting: False when the outbox is full or the peer gone, and nothing is sent."""
        peer = self.peers.get(name)
        if peer is None or peer.outbox.full():
            return False
        peer.outbox.put_nowait((message, 0, False))
        return True

    def _peer(self, name: str) -> Peer:
        peer = self.peers.get(name)
        if peer is None:
            raise ConnectionLost(f"nobody called {name} is connected")
        return peer

    async def _send_outbox(self, peer: Peer) -> None:
        while True:
            message, call_id, reply = await peer.outbox.get()
            if not await self._transmit(peer.identity, message, call_id, reply):
                self._drop(peer, "its connection is gone, or its buffers stayed full")
                return

    async def _tell(self, identity: bytes, message: Message, call_id: int) -> None:
        """Answer somebody who may be no peer; whether it arrives is nobody's concern here."""
        await self._transmit(identity, message, call_id, bool(call_id))

    async def _transmit(self, identity: bytes, message: Message, call_id: int, reply: bool) -> bool:
        """False when the peer cannot be reached, or takes nothing for the heartbeat timeout."""
        frames = [identity, *encode(message, call_id=call_id, reply=reply, limits=self._limits)]
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                await self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self.counters["full_buffers"] += 1
                if time.monotonic() > deadline:
                    return False
                await asyncio.sleep(RETRY_S)
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                return False
            else:
                return True

    # ----------------------------------------------------------------------------------------------- receiving

    async def _receive(self) -> None:
        while True:
            identity_frame, *rest = await self._socket.recv_multipart(copy=False)
            identity = identity_frame.bytes
            if self._bad[identity] >= MAX_BAD_MESSAGES:
                self.counters["ignored_messages"] += 1
                continue
            try:
                envelope = decode(views(rest), self._limits)
            except BadMessage as bad:
                await self._refuse(identity, bad)
                continue
            peer = self._by_identity.get(identity)
            if peer is None:
                self._spawn(self._welcome(identity, envelope), "welcome")
                continue
            peer.last_heard = time.monotonic()
            await self._dispatch(peer, envelope)

    async def _dispatch(self, peer: Peer, envelope: Envelope) -> None:
        message, call_id, reply = envelope
        if reply:
            peer.calls.resolve(call_id, message)
        elif call_id:
            self._spawn(self._answer(peer, message, call_id), f"{type(message).__name__} of {peer.name}")
        elif isinstance(message, Heartbeat):
            if message.report:
                peer.report = message.report
        elif isinstance(message, Goodbye):
            self._drop(peer, "it said goodbye")
        elif isinstance(message, ErrorReply):
            log.warning("%s could not read a message of ours: %s", peer.name, message.message)
        else:
            try:
                await self._on_note(peer, message)
            except ValueError as error:
                await self._refuse(peer.identity, BadMessage(str(error)))

    async def _answer(self, peer: Peer, message: Message, call_id: int) -> None:
        reply = await answer(self._on_call(peer, message), f"{type(message).__name__} of {peer.name}")
        if self.peers.get(peer.name) is peer:
            await peer.outbox.put((reply, call_id, True))

    async def _welcome(self, identity: bytes, envelope: Envelope) -> None:
        """The first message of a connection; anything but a proper Hello is refused, and can be tried again."""
        hello = envelope.message
        reply: Message
        if not isinstance(hello, Hello) or not envelope.call_id:
            reply = ErrorReply("ConnectionLost", f"say Hello before {type(hello).__name__}: this hub does not know you")
        elif identity in self._by_identity:
            reply = ErrorReply("ValueError", f"this connection said Hello as {self._by_identity[identity].name} before")
        elif hello.name in self.peers:
            reply = ErrorReply(
                "ValueError", f"a {self.peers[hello.name].role} called {hello.name} is connected already"
            )
        else:
            peer = Peer(hello.name, hello.role, identity, PendingCalls(hello.name), time.monotonic())
            self.peers[peer.name] = self._by_identity[identity] = peer
            reply = await answer(self._on_join(peer, hello), f"Hello of {hello.name}")
            if isinstance(reply, ErrorReply):
                del self.peers[peer.name], self._by_identity[identity]
            else:
                peer.outbox.put_nowait((reply, envelope.call_id, True))
                self._senders[peer.name] = self._spawn(self._send_outbox(peer), f"sender to {peer.name}")
                return
        await self._tell(identity, reply, envelope.call_id)

    async def _refuse(self, identity: bytes, bad: BadMessage) -> None:
        self.counters["bad_messages"] += 1
        self._bad[identity] += 1
        if self._bad[identity] == MAX_BAD_MESSAGES:
            log.warning("a connection sent %d bad messages and is heard no longer; the last: %s", MAX_BAD_MESSAGES, bad)
            self.counters["connections_cut"] += 1
            if (peer := self._by_identity.get(identity)) is not None:
                self._drop(peer, "it sent too many bad messages")
        if not bad.reply:
            self._spawn(self._tell(identity, describe(bad), bad.call_id), "refusal")

    # ----------------------------------------------------------------------------------------------- life and death

    async def _watch(self) -> None:
        """Beat to every peer, and take the silent for dead."""
        while True:
            await asyncio.sleep(self._interval_s)
            for peer in list(self.peers.values()):
                if peer.silent_s > self._timeout_s:
                    self._drop(peer, f"silent for {peer.silent_s:.1f} s")
                elif not peer.outbox.full():
                    peer.outbox.put_nowait((Heartbeat(), 0, False))

    def _drop(self, peer: Peer, reason: str) -> None:
        if self.peers.get(peer.name) is not peer:
            return
        del self.peers[peer.name], self._by_identity[peer.identity]
        self.counters["peers_lost"] += 1
        peer.calls.fail(ConnectionLost(f"{peer.role} {peer.name} is gone: {reason}"))
        sender = self._senders.pop(peer.name, None)
        if sender is not None and sender is not asyncio.current_task():
            sender.cancel()
        self._spawn(self._discard(peer), f"what {peer.name} does not hear")
        self._spawn(self._on_leave(peer, reason), f"{peer.name} leaves")

    async def _discard(self, peer: Peer) -> None:
        """Free whoever waits for room in the outbox: every message taken lets one waiting sender go on."""
        while not peer.outbox.empty():
            peer.outbox.get_nowait()
            await asyncio.sleep(0)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(work, name=name)
