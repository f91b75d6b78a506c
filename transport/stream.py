"""One ZeroMQ socket on an asyncio event loop (uvloop too), and the messages that wait for room in it.

A plain socket behind ``add_reader``, because ``zmq.asyncio`` makes futures and wake-ups per message. ZeroMQ's file
descriptor only tells that *something* happened, and any operation may use that up; so every operation is followed by
one more look at the socket, which reads what came and lets the ``Outbox`` es try again. Where a look would only find
nothing, it asks for the socket's events instead: a read in vain costs an exception, twice as much.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from socket import SHUT_RDWR
from socket import socket as Connection
from typing import Any

import zmq

from slime_async.transport.buffers import BORROW_FROM_BYTES, Buffer, Limits
from slime_async.transport.errors import ConnectionLost

HIGH_WATER_MARK = 64
"""Messages that ZeroMQ buffers each way per connection; beyond it, senders wait"""
BURST = 64
"""Messages read before other work of the loop gets a turn"""
HANDSHAKE_S = 10.0
"""For a connection to say who it is; those that don't are closed"""
TOGETHER = 8
"""Messages that leave together: fewer wake ZeroMQ's thread too often, more keep the other side waiting for the first"""
SILENCE_READ = 1024
"""Messages read before a silent peer is given up"""

_POLLIN = int(zmq.POLLIN)
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, limits: Limits) -> zmq.Socket[bytes]:
    """A socket with finite buffers that refuses frames beyond ``limits`` before it allocates them."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, max(limits.frame_bytes, limits.header_bytes))
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    return socket


async def terminate(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """End a context whose sockets are closed; goes on to its end when its caller is cancelled meanwhile."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, context.term))


def watch_connections(socket: zmq.Socket[bytes], timeout_s: float) -> None:
    """Let the kernel find connections that are dead below us: what ZeroMQ holds for them is then freed.

    It has twice our patience: what our own heartbeats notice, we can explain. ZeroMQ's heartbeats are left off: when
    the connection of a full socket breaks, the next one ends the process, with a failed assertion (libzmq issues 3937
    and 4767).
    """
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, max(1, int(timeout_s)))
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, max(1, int(timeout_s / 3)))
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.setsockopt(zmq.TCP_MAXRT, max(1000, int(2 * timeout_s * 1000)))


def hang_up(frame: memoryview) -> bool:
    """Close the connection on which a message of this frame just came; whether that could be done.

    ZeroMQ has no call for it, but tells the connection's file descriptor. Were it closed and given to another since,
    that one is closed, and comes back by itself.
    """
    try:
        descriptor = os.dup(int(frame.obj.get(zmq.SRCFD)))  # type: ignore[attr-defined]  # of pyzmq's Frame
        with Connection(fileno=descriptor) as connection:
            connection.shutdown(SHUT_RDWR)
    except OSError:  # it is gone already
        return False
    return True


class Stream:
    """Reads every message of ``socket`` into ``on_frames`` and calls ``on_room`` when blocked sends may go on.

    ``on_error`` gets what these two, or the socket, raise: a callback of the loop has no caller who would.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_frames: Callable[[list[memoryview]], None],
        on_room: Callable[[], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.socket = socket
        self._on_error = on_error
        self._on_frames = on_frames
        self._on_room = on_room
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        # the backend's own: without the options that pyzmq checks for each frame
        self._send: Callable[..., Any] = super(zmq.Socket, socket).send
        self._scheduled = False
        self._looking = False
        self._sent = False
        """While looking: something was sent after the latest look"""
        self.closed = False
        self._loop.add_reader(self._fd, self._look)
        self.look_soon()

    def look_soon(self) -> None:
        """At the end of this turn of the loop: let waiting messages go on, and read what came."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._look_again)

    def _look(self) -> None:
        self._attend(came=True)

    def _look_again(self) -> None:
        self._scheduled = False
        self._attend(came=False)

    def _attend(self, came: bool) -> None:
        """``came``: ZeroMQ told that something happened; it may have been said before our own latest operation."""
        self._looking = True
        try:
            if not came and not self.closed:
                self._on_room()
                came = self._can_read()
            if came and not self.closed:
                if self.read(BURST) == BURST:
                    self.look_soon()
                self._sent = False
                if not self.closed:
                    self._on_room()
                if self._sent and self._can_read():
                    self.look_soon()
        except Exception as error:
            self._on_error(error)
            raise
        finally:
            self._looking = False

    def _can_read(self) -> bool:
        return not self.closed and bool(int(self.socket.getsockopt(zmq.EVENTS)) & _POLLIN)

    def read(self, most: int) -> int:
        """Hand on up to ``most`` messages that are here already; returns how many."""
        recv: Callable[..., Any] = self.socket.recv
        for done in range(most):
            try:
                frame = recv(_LAST, False, False)
            except zmq.Again:
                return done
            frames = [memoryview(frame)]
            while frame.more:
                frame = recv(_LAST, False, False)
                frames.append(memoryview(frame))
            self._on_frames(frames)
            if self.closed:
                return done
        return most

    def try_send(self, frames: Sequence[Buffer]) -> bool:
        """Whether the message is on its way; ``False`` when there is no room now.

        Raises ``ConnectionLost`` when its receiver is not connected any more.
        """
        if self.closed:
            raise ConnectionLost("the connection is closed")
        send, last = self._send, len(frames) - 1
        try:
            for i, frame in enumerate(frames):
                size = frame.nbytes if type(frame) is memoryview else len(frame)
                send(frame, _LAST if i == last else _MORE, size < BORROW_FROM_BYTES, False)
        except zmq.Again:  # only ever raised for the first frame: ZeroMQ takes messages whole
            self.look_soon()
            return False
        except zmq.ZMQError as error:
            self.look_soon()
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise ConnectionLost("closed the connection") from None
        if self._looking:
            self._sent = True
        else:
            self.look_soon()
        return True

    def close(self, linger_s: float = 0.0) -> None:
        """Idempotent. What ZeroMQ holds unsent is given up after ``linger_s``."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._fd)
            self.socket.close(linger=int(linger_s * 1000))


Outgoing = Sequence[Buffer] | Callable[[], Sequence[Buffer]]
"""Frames, or what makes them once they leave: such a message may change while it waits"""


class Outbox:
    """Messages to one peer, in order, until they are with ZeroMQ. Its users bound how many.

    What is put within one turn of the loop leaves at its end, or ``TOGETHER`` at a time: ZeroMQ's thread is then woken
    once and not for each message, which costs more than the messages do, and the other side begins meanwhile.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Buffer]], bool],
        flush_soon: Callable[[], None],
        on_blocked: Callable[[int], None],
    ) -> None:
        """``flush_soon`` sees to it that ``flush`` is called; ``on_blocked`` hears how many more found no room."""
        self._send = send
        self._flush_soon = flush_soon
        self._on_blocked = on_blocked
        self._waiting: deque[tuple[Outgoing, asyncio.Future[None]]] = deque()
        self._blocked = 0
        """Of the first that wait, how many have found no room"""
        self._progress_at = 0.0
        self._loop = asyncio.get_running_loop()  # kept: asking for it is a system call on Python 3.11

    def __len__(self) -> int:
        return len(self._waiting)

    def ends_with(self, message: Outgoing) -> bool:
        """Whether this very message is the last that waits: what makes its frames may still change."""
        return bool(self._waiting) and self._waiting[-1][0] is message

    def put(self, message: Outgoing) -> asyncio.Future[None]:
        """A future that is done once the message is sent, or failed. Cancelling it takes the message back."""
        if not self._waiting:
            self._progress_at = time.monotonic()
            self._flush_soon()
        sent = self._loop.create_future()
        self._waiting.append((message, sent))
        if self._blocked:
            self._blocked += 1
            self._on_blocked(1)
        elif len(self._waiting) >= TOGETHER:
            self.flush()
        return sent

    def flush(self) -> None:
        """Send what there is room for; what is lost with the connection stays for ``fail``."""
        while self._waiting:
            message, sent = self._waiting[0]
            if not sent.done():
                try:
                    has_room = self._send(message() if callable(message) else message)
                except ConnectionLost:
                    return  # whoever sends knows, and will see to the peer
                if not has_room:
                    self._on_blocked(len(self._waiting) - self._blocked)
                    self._blocked = len(self._waiting)
                    return
                sent.set_result(None)
            self._waiting.popleft()
            self._blocked = max(0, self._blocked - 1)
            self._progress_at = time.monotonic()

    @property
    def blocked(self) -> bool:
        """Whether messages wait that found no room."""
        return self._blocked > 0

    def blocked_s(self) -> float:
        """For how long the oldest message has found no room."""
        return time.monotonic() - self._progress_at if self._waiting else 0.0

    async def drained(self) -> None:
        """Returns when nothing waits. Raises what ``fail`` was told."""
        while self._waiting:
            sent = self._waiting[-1][1]
            await asyncio.wait([sent])
            if not sent.cancelled():
                sent.result()

    def fail(self, error: Exception) -> None:
        """Give up everything that waits; whoever waits for it gets ``error``."""
        self._blocked = 0
        while self._waiting:
            _, sent = self._waiting.popleft()
            if not sent.done():
                sent.set_exception(error)
                sent.exception()  # its waiter may have been cancelled: no "never retrieved" then
