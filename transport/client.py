"""A role's end of its stream to the hub: one DEALER socket, calls both ways, notes both ways, heartbeats.

The owner awaits ``wait_closed`` beside its own work: it returns after ``close`` and raises whatever else ended the
connection, be it the hub's silence, its refusal or a handler of notes that failed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self

import zmq
import zmq.asyncio

from slime_async.protocol import ErrorReply, Goodbye, Heartbeat, Hello, Message, Report, Welcome
from slime_async.transport.calls import PendingCalls, answer, configure, describe, views
from slime_async.transport.codec import DEFAULT_LIMITS, BadMessage, Envelope, Limits, decode, encode
from slime_async.transport.errors import ConnectionLost, DeadlineExceeded

log = logging.getLogger(__name__)

Handler = Callable[[Message], Awaitable[Message | None]]
"""Gets what the hub sends on its own; returns the reply to calls, None for notes"""

CONNECT_TIMEOUT_S = 30.0
"""For the hub to answer ``Hello``; it may be started at the same time as its peers."""


class HubClient:
    """One connection; make it with ``connect``. All methods belong to the event loop that made it."""

    welcome: Welcome

    def __init__(self, address: str, handler: Handler, limits: Limits) -> None:
        self._address = address
        self._handler = handler
        self._limits = limits
        self._calls = PendingCalls(f"the hub at {address}")
        self._report: Report = {}
        self._last_heard = time.monotonic()
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        configure(self._socket, limits.frame_bytes)
        self._socket.connect(address)

    @classmethod
    async def connect(
        cls,
        address: str,
        hello: Hello,
        *,
        handler: Handler,
        timeout_s: float = CONNECT_TIMEOUT_S,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Self:
        """Say hello and wait to be welcomed.

        Raises ``ConnectionLost`` when nobody answers, ``RemoteError`` with the hub's reason when it refuses.
        """
        client = cls(address, handler, limits)
        client._spawn(client._receive(), "receive")
        try:
            welcome = await client.call(hello, timeout_s)
        except DeadlineExceeded as error:
            await client._shut()
            raise ConnectionLost(f"no hub answered at {address} within {timeout_s:g} s: is it running?") from error
        except BaseException:
            await client._shut()
            raise
        assert isinstance(welcome, Welcome)
        client.welcome = welcome
        client._spawn(client._beat(), "heartbeats")
        return client

    async def call(self, message: Message, timeout_s: float) -> Message:
        """The hub's reply. Raises ``RemoteError``, ``DeadlineExceeded`` or ``ConnectionLost``."""
        return await self._calls.call(self._send, message, timeout_s)

    async def note(self, message: Message) -> None:
        """Send without a reply; waits while the socket's buffer is full."""
        await self._send(message, 0, False)

    def set_report(self, report: Report) -> None:
        """What the next heartbeats carry."""
        self._report = report

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    async def close(self) -> None:
        """Say goodbye; what was sent before still goes out, within the socket's linger time."""
        if not self._closed.done():
            await self._send(Goodbye(), 0, False)
            self._closed.set_result(None)
        await self._shut()

    async def _shut(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._calls.fail(ConnectionLost(f"the connection to {self._address} was closed"))
        if self._closed.done() and not self._closed.cancelled():
            self._closed.exception()  # whoever closes has been told, or does not want to know
        self._socket.close()

    # --------------------------------------------------------------------------------------------- the loops' side

    async def _send(self, message: Message, call_id: int, reply: bool) -> None:
        frames = encode(message, call_id=call_id, reply=reply, limits=self._limits)
        await self._socket.send_multipart(frames, copy=False)

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            self._last_heard = time.monotonic()
            try:
                envelope = decode(views(frames), self._limits)
            except BadMessage as bad:
                log.warning("the hub sent what cannot be read: %s", bad)
                if bad.reply:
                    self._calls.resolve(bad.call_id, describe(bad))
                else:
                    await self._send(describe(bad), bad.call_id, bool(bad.call_id))
                continue
            await self._dispatch(envelope)

    async def _dispatch(self, envelope: Envelope) -> None:
        message, call_id, reply = envelope
        if reply:
            self._calls.resolve(call_id, message)
        elif call_id:
            self._spawn(self._answer(message, call_id), f"answer {type(message).__name__}")
        elif isinstance(message, ErrorReply):
            raise ConnectionLost(f"the hub at {self._address} refuses this connection: {message.message}")
        elif not isinstance(message, Heartbeat):
            await self._handler(message)

    async def _answer(self, message: Message, call_id: int) -> None:
        await self._send(await answer(self._handler(message), type(message).__name__), call_id, True)

    async def _beat(self) -> None:
        """Report to the hub, and take it for dead when it has been silent for too long."""
        while True:
            await self._send(Heartbeat(self._report), 0, False)
            await asyncio.sleep(self.welcome.heartbeat_interval_s)
            silent_s = time.monotonic() - self._last_heard
            if silent_s > self.welcome.heartbeat_timeout_s:
                raise ConnectionLost(f"the hub at {self._address} has been silent for {silent_s:.1f} s")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A background task that failed ends the connection: nobody waits for a reply that cannot come."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        lost = error if isinstance(error, ConnectionLost) else ConnectionLost(f"{task.get_name()} failed: {error!r}")
        self._calls.fail(lost)
        if not self._closed.done():
            self._closed.set_exception(error)
