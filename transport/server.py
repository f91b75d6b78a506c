"""The hub's side of the streams: one ROUTER socket, one conversation per welcomed peer.

::

    Hello ──► on_join ──► Welcome        a peer by name, until on_leave
    calls ──► on_call ──► reply          at once, or from a task of its own
    notes ──► on_note                    but heartbeats, whose report is kept in Peer.report
    silence, a broken connection, room for nothing, garbage, a goodbye ──► on_leave(peer, why)

Nothing is dropped in silence: a message that finds no room waits, and its sender with it; a peer that takes nothing
for ``heartbeat_timeout_s`` is cut off, counted, and its calls fail. Messages of strangers are answered and counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import zmq

from slime_async.protocol import ErrorReply, Goodbye, Heartbeat, Hello, Message, Report, Role, Welcome
from slime_async.transport.codec import DEFAULT_LIMITS, Buffer, Limits, decode, encode
from slime_async.transport.conversation import NOT_CONNECTED, Answer, Conversation, Traffic, error_reply
from slime_async.transport.errors import BadMessage, ConnectionLost, RemoteError
from slime_async.transport.security import Doorkeeper, ServerSecurity, authorized, check_address
from slime_async.transport.stream import SILENCE_READ, Outbox, Stream, hang_up, new_socket, terminate, watch_connections

log = logging.getLogger(__name__)

MAX_STRIKES = 8
"""Messages that nobody can read, or of strangers, until their sender gets no more answers"""
MAX_REMEMBERED = 4096
"""Connections whose strikes are remembered, the latest ones"""
MAX_HANDLING = 4096
"""Calls and notes of one peer in progress; one that makes more does not wait for replies"""

IO_THREADS = min(4, os.cpu_count() or 1)
"""ZeroMQ's own threads where connections are encrypted; each connection belongs to one of them. Plain ones need one"""

_HEARTBEAT = encode(Heartbeat())


@dataclass(slots=True, eq=False)
class Peer:
    """One connected role. ``report`` is the one of its latest heartbeat."""

    hello: Hello
    identity: bytes
    conversation: Conversation = field(repr=False)
    report: Report = field(default_factory=dict)
    joined: bool = False
    """``on_join`` has been called, and has not refused: ``on_leave`` will be"""

    @property
    def name(self) -> str:
        return self.hello.name

    @property
    def role(self) -> Role:
        return self.hello.role

    @property
    def silent_s(self) -> float:
        """Since its last message."""
        return self.conversation.silent_s


@dataclass(slots=True)
class ServerStatistics(Traffic):
    """``Traffic`` of all peers, and who was turned away."""

    cut_off: int = 0
    """Peers disconnected because they took no message or sent garbage"""
    refused: int = 0
    """Connections without an authorized key"""
    hung_up: int = 0
    """Connections closed because their peer went on after it was cut off"""


class Server:
    """Listens at ``address`` (port 0 takes a free one; ``address`` then names it, once started).

    ``on_join`` may raise ``ValueError`` to refuse a ``Hello``; ``on_call`` and ``on_note`` return their answer, or a
    coroutine where they have to wait for it, and may raise ``ValueError``, ``RemoteError``,
    ``DeadlineExceeded`` or ``ConnectionLost`` to answer with an ``ErrorReply``. Anything else that a handler raises
    answers its caller and ends ``serve`` with that error. ``on_leave`` is called once for each peer that joined, after
    it is out of ``peers``; its calls in progress are cancelled. A message must get through within
    ``heartbeat_timeout_s``, for the heartbeats behind it to count. Raises ``ValueError`` for an address that needs
    ``security`` or ``insecure``.
    """

    def __init__(
        self,
        address: str,
        *,
        on_call: Callable[[Peer, Message], Answer],
        on_note: Callable[[Peer, Message], Coroutine[Any, Any, None] | None],
        on_join: Callable[[Peer, Hello], Awaitable[Welcome]],
        on_leave: Callable[[Peer, str], None],
        heartbeat_interval_s: float = 1.0,
        heartbeat_timeout_s: float = 10.0,
        security: ServerSecurity | None = None,
        insecure: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        check_address(address, insecure or security is not None)
        self.address = address
        self._on_call, self._on_note, self._on_join, self._on_leave = on_call, on_note, on_join, on_leave
        self._interval_s, self._timeout_s = heartbeat_interval_s, heartbeat_timeout_s
        self._security = security
        self._limits = limits
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._doorkeeper: Doorkeeper | None = None
        self._stream: Stream | None = None
        self._heart: asyncio.Task[None] | None = None
        self._by_identity: dict[bytes, Peer] = {}
        self._by_name: dict[str, Peer] = {}
        self._waiting: dict[bytes, Outbox] = {}
        """Where a message waits"""
        self._strikes: OrderedDict[bytes, int] = OrderedDict()
        self._statistics = ServerStatistics()
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None

    @property
    def peers(self) -> Mapping[str, Peer]:
        """Who is connected, by name."""
        return MappingProxyType(self._by_name)

    def statistics(self) -> ServerStatistics:
        """A snapshot."""
        refused = self._doorkeeper.refused if self._doorkeeper else 0
        return ServerStatistics(**{**asdict(self._statistics), "refused": refused})

    async def start(self) -> None:
        """Listen. Raises ``OSError`` when the address is taken, ``ValueError`` for a bad list of authorized keys."""
        if self._security is not None:
            authorized(self._security.authorized_keys)  # an error now, not at the first connection
        self._context = zmq.Context(1 if self._security is None else IO_THREADS)
        socket = new_socket(self._context, zmq.ROUTER, self._limits)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        watch_connections(socket, self._timeout_s)
        if self._security is not None:
            self._doorkeeper = Doorkeeper(self._context, self._security, self._fail)
            self._doorkeeper.secure_server(socket)
        try:
            socket.setsockopt(zmq.IPV6, "[" in self.address)
            socket.bind(self.address)
        except zmq.ZMQError as error:
            if self._doorkeeper is not None:
                self._doorkeeper.close()
            socket.close()
            self._context.term()
            raise OSError(error.errno, f"cannot listen at {self.address}: {error}") from error
        self.address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stream = Stream(socket, self._receive, self._flush, self._fail)
        self._heart = asyncio.create_task(self._beat())
        self._heart.add_done_callback(self._heart_stopped)

    async def serve(self) -> None:
        """Runs until ``close``, or raises the error of the handler or task that died."""
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure

    async def call(self, peer_name: str, message: Message, timeout_s: float) -> Message:
        """The peer's reply. Raises ``RemoteError``, ``DeadlineExceeded`` or ``ConnectionLost``."""
        return await self._peer(peer_name).conversation.call(message, timeout_s)

    async def note(self, peer_name: str, message: Message) -> None:
        """Returns once the message is on its way; waits while the peer takes none. Raises ``ConnectionLost``."""
        await self._peer(peer_name).conversation.note(message)

    def note_nowait(self, peer_name: str, message: Message) -> bool:
        """As ``note``, without waiting. False when the peer is gone or too much waits for it: nothing is sent then."""
        peer = self._by_name.get(peer_name)
        return peer is not None and peer.conversation.note_nowait(message)

    def is_alive(self, peer_name: str) -> bool:
        """Whether the peer is connected, as far as can be known now; one whose connection broke leaves at once."""
        peer = self._by_name.get(peer_name)
        return peer is not None and self._is_alive(peer)

    async def close(self, linger_s: float = 1.0) -> None:
        """Stop listening; what ZeroMQ holds unsent is given up after ``linger_s``. Idempotent."""
        if self._heart is not None:
            self._heart.remove_done_callback(self._heart_stopped)
            self._heart.cancel()
            self._heart = None
        if self._stream is not None and not self._stream.closed:
            self._flush()
        for peer in list(self._by_identity.values()):
            peer.conversation.close(ConnectionLost(f"the hub closed its connection to {peer.name}"))
        self._by_identity.clear()
        self._by_name.clear()
        if self._stream is not None:
            self._stream.close(linger_s)
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._ended.set()
        if self._context is not None:
            await terminate(self._context)

    # ---------------------------------------------------------------------------------------------- coming in

    def _receive(self, frames: list[memoryview]) -> None:
        identity = bytes(frames[0])
        peer = self._by_identity.get(identity)
        if peer is None:
            if self._strikes.get(identity, 0) < MAX_STRIKES:
                self._meet(identity, frames[1:])
            else:
                self._statistics.ignored += 1
                self._statistics.hung_up += hang_up(frames[0])
            return
        peer.conversation.receive(frames[1:])
        if peer.conversation.handling > MAX_HANDLING:
            self._cut_off(peer, f"has more than {MAX_HANDLING} calls and notes in progress")

    def _meet(self, identity: bytes, frames: Sequence[Buffer]) -> None:
        """The first message of a connection: a ``Hello``, or something to refuse."""
        self._statistics.messages_in += 1
        try:
            envelope = decode(frames, self._limits)
        except BadMessage as bad:
            self._statistics.bad += 1
            self._strike(identity)
            self._tell(identity, bad, bad.call_id)
            return
        hello = envelope.message
        if not isinstance(hello, Hello) or envelope.reply or not envelope.call_id:
            self._statistics.ignored += 1
            self._strike(identity)
            text = f"the hub does not know who sent this {type(hello).__name__}: say Hello first"
            self._tell(identity, RemoteError(NOT_CONNECTED, text), 0)
            return
        other = self._by_name.get(hello.name)
        if other is not None and self._is_alive(other):
            text = f"a peer named {hello.name!r} is connected: names are unique among the living"
            self._tell(identity, ValueError(text), envelope.call_id)
            return
        peer = Peer(hello, identity, self._converse(identity, hello))
        self._by_identity[identity] = self._by_name[hello.name] = peer
        peer.conversation.take(envelope)

    def _converse(self, identity: bytes, hello: Hello) -> Conversation:
        def flush_soon() -> None:
            assert self._stream is not None
            self._waiting[identity] = conversation.outbox
            self._stream.look_soon()

        conversation = Conversation(
            f"{hello.role} {hello.name}",
            partial(self._send, identity),
            flush_soon,
            on_call=lambda message: self._called(self._by_identity[identity], message),
            on_note=lambda message: self._noted(self._by_identity[identity], message),
            on_bug=self._fail,
            on_bad=lambda bad: self._bad(identity, bad),
            limits=self._limits,
            traffic=self._statistics,
        )
        return conversation

    def _called(self, peer: Peer, message: Message) -> Answer:
        return self._join(peer, message) if isinstance(message, Hello) else self._on_call(peer, message)

    async def _join(self, peer: Peer, message: Hello) -> Message:
        if message is not peer.hello:
            raise ValueError(f"{peer.name} said Hello twice: once per connection")
        peer.joined = True
        try:
            welcome = await self._on_join(peer, message)
        except ValueError:
            peer.joined = False
            self._forget(peer)
            raise
        return replace(welcome, heartbeat_interval_s=self._interval_s, heartbeat_timeout_s=self._timeout_s)

    def _noted(self, peer: Peer, message: Message) -> Coroutine[Any, Any, None] | None:
        if isinstance(message, Goodbye):
            self._leave(peer, "it said goodbye")
        elif isinstance(message, Heartbeat):
            peer.report = message.report
        elif isinstance(message, ErrorReply):
            log.warning("%s could not take a message of the hub's: %s: %s", peer.name, message.code, message.message)
        else:
            return self._on_note(peer, message)
        return None

    # ---------------------------------------------------------------------------------------------- going out

    def _send(self, identity: bytes, frames: Sequence[Buffer]) -> bool:
        assert self._stream is not None
        try:
            return self._stream.try_send([identity, *frames])
        except ConnectionLost as lost:
            peer = self._by_identity.get(identity)
            if peer is not None:
                asyncio.get_running_loop().call_soon(self._leave, peer, str(lost))
            raise

    def _flush(self) -> None:
        """There may be room: let each peer's waiting messages go on."""
        for identity, outbox in list(self._waiting.items()):
            outbox.flush()
            if not len(outbox):
                del self._waiting[identity]

    def _tell(self, identity: bytes, error: Exception, call_id: int) -> None:
        """An ``ErrorReply`` to someone who is no peer, if there is room for it now."""
        assert self._stream is not None
        frames = encode(error_reply(error), call_id=call_id, reply=call_id != 0)
        with suppress(ConnectionLost):  # gone already, and nobody waits for it
            self._stream.try_send([identity, *frames])

    async def _beat(self) -> None:
        """Each interval: a heartbeat to every peer; those that are silent, stuck or gone leave."""
        assert self._stream is not None
        while True:
            await asyncio.sleep(self._interval_s)
            for peer in list(self._by_identity.values()):
                talk = peer.conversation
                if talk.silent_s > self._timeout_s:
                    self._stream.read(SILENCE_READ)  # if it was this loop that slept, its messages are here
                if talk.silent_s > self._timeout_s:
                    self._leave(peer, f"silent for {talk.silent_s:.1f} s, the limit is {self._timeout_s:g} s")
                elif talk.outbox.blocked_s() > self._timeout_s:
                    self._cut_off(peer, f"took no message for {talk.outbox.blocked_s():.1f} s")
                else:
                    self._is_alive(peer)

    def _is_alive(self, peer: Peer) -> bool:
        """Send a heartbeat. One whose connection broke leaves at once."""
        try:
            if not len(peer.conversation.outbox):
                self._send(peer.identity, _HEARTBEAT)
        except ConnectionLost as lost:
            self._leave(peer, str(lost))
            return False
        return True

    # ---------------------------------------------------------------------------------------------- ends

    def _peer(self, name: str) -> Peer:
        peer = self._by_name.get(name)
        if peer is None:
            raise ConnectionLost(f"no peer named {name!r} is connected")
        return peer

    def _forget(self, peer: Peer) -> None:
        self._by_identity.pop(peer.identity, None)
        if self._by_name.get(peer.name) is peer:
            del self._by_name[peer.name]

    def _leave(self, peer: Peer, reason: str) -> None:
        if self._by_identity.get(peer.identity) is peer:
            self._forget(peer)
            peer.conversation.close(ConnectionLost(f"{peer.conversation.other} left: {reason}"))
            if peer.joined:
                try:
                    self._on_leave(peer, reason)
                except Exception as error:
                    self._fail(error)
                    raise

    def _cut_off(self, peer: Peer, reason: str) -> None:
        """Disconnect a peer for what it does: it is told if it listens, and its messages count as ignored."""
        if self._by_identity.get(peer.identity) is peer:
            self._statistics.cut_off += 1
            self._strike(peer.identity, MAX_STRIKES)
            peer.conversation.outbox.flush()
            self._tell(peer.identity, RemoteError(NOT_CONNECTED, f"cut off by the hub: {reason}"), 0)
            self._leave(peer, f"cut off: {reason}")

    def _bad(self, identity: bytes, bad: BadMessage) -> None:
        self._strike(identity)
        peer = self._by_identity.get(identity)
        if peer is not None and self._strikes[identity] >= MAX_STRIKES:
            self._cut_off(peer, f"sent {MAX_STRIKES} messages that break the rules, the last: {bad}")

    def _strike(self, identity: bytes, count: int = 1) -> None:
        self._strikes[identity] = self._strikes.pop(identity, 0) + count
        if len(self._strikes) > MAX_REMEMBERED:
            self._strikes.popitem(last=False)

    def _heart_stopped(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """A handler or task of ours died: ``serve`` raises the first such error."""
        self._failure = self._failure or error
        self._ended.set()
