"""What both ends of a stream share: calls that wait for their replies, and the answers to the other side's calls."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence

import zmq
import zmq.asyncio

from slime_async.protocol import ErrorReply, Message
from slime_async.transport.codec import Buffer
from slime_async.transport.errors import BadMessage, ConnectionLost, DeadlineExceeded, RemoteError

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 1000
"""Messages that a socket buffers per peer and direction; a full one makes its sender wait, never drop."""
LINGER_MS = 2000
"""How long a closing socket goes on sending what it has accepted."""

Send = Callable[[Message, int, bool], Awaitable[None]]
"""(message, call id, is a reply)"""


class PendingCalls:
    """Calls to one peer whose replies have not come yet."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._ids = itertools.count(1)
        self._futures: dict[int, asyncio.Future[Message]] = {}
        self._lost: ConnectionLost | None = None

    async def call(self, send: Send, message: Message, timeout_s: float) -> Message:
        """Send and wait. Raises ``RemoteError``, ``DeadlineExceeded`` or ``ConnectionLost``, each naming the call."""
        what = f"{type(message).__name__} to {self._peer}"
        if self._lost is not None:
            raise ConnectionLost(f"{what}: {self._lost}")
        call_id = next(self._ids)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._futures[call_id] = future
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                await send(message, call_id, False)
                reply = await future
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(f"{what} had no reply within {timeout_s:g} s") from error
        finally:
            del self._futures[call_id]
        if isinstance(reply, ErrorReply):
            raise RemoteError(reply.code, reply.message)
        return reply

    def resolve(self, call_id: int, reply: Message) -> None:
        """Replies to calls that are no longer waited for (their deadline passed) go unread."""
        future = self._futures.get(call_id)
        if future is not None and not future.done():
            future.set_result(reply)

    def fail(self, error: ConnectionLost) -> None:
        """The peer is gone: every open and later call raises ``error``."""
        self._lost = error
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)


async def answer(handle: Awaitable[Message | None], what: str) -> Message:
    """The reply to a call: the handler's, or what it raised, which travels back to the caller."""
    try:
        reply = await handle
    except RemoteError as error:  # a call passed on: the caller gets the first cause
        return ErrorReply(error.code, error.message)
    except Exception as error:
        expected = isinstance(error, ValueError | TimeoutError | ConnectionError)
        log.log(logging.DEBUG if expected else logging.ERROR, "%s failed", what, exc_info=error)
        return ErrorReply(type(error).__name__, str(error))
    if reply is None:
        return ErrorReply("BadMessage", f"{what} is no call")
    return reply


def describe(bad: BadMessage) -> ErrorReply:
    return ErrorReply("BadMessage", str(bad))


def views(frames: Sequence[zmq.Frame]) -> list[Buffer]:
    """The bytes of received frames, uncopied."""
    return [frame.buffer for frame in frames]


def configure(socket: zmq.asyncio.Socket, max_frame_bytes: int) -> None:
    """Finite buffers, no oversized frames, and dead TCP connections noticed below our own heartbeats."""
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30000)
