"""A role's side of the streams: one DEALER socket to the hub, calls and notes either way.

::

    connect ──► Hello ──► Welcome ──► calls, notes, heartbeats ──► close (a goodbye, then what is unsent)
                  ▲                        │ the connection breaks, or the hub is silent
                  └─── within reconnect_s ─┘ else wait_closed and every call raise ConnectionLost
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import zmq

from slime_async.protocol import ErrorReply, Goodbye, Heartbeat, Hello, Message, Report, Welcome
from slime_async.telemetry.process import PROCESS
from slime_async.transport.codec import DEFAULT_LIMITS, Buffer, Limits
from slime_async.transport.conversation import NOT_CONNECTED, Conversation, Traffic
from slime_async.transport.errors import BadMessage, ConnectionLost, DeadlineExceeded, RemoteError
from slime_async.transport.link import RETRY_INTERVAL_S, Link
from slime_async.transport.security import ClientSecurity
from slime_async.transport.stream import SILENCE_READ, terminate

log = logging.getLogger(__name__)

Handler = Callable[[Message], Awaitable[Message | None]]
"""Takes what the hub sends. A call's reply is what it returns; what it returns for a note must be ``None``"""


class HubClient:
    """Connected to the hub from ``connect`` to ``close``; all methods belong to the event loop of ``connect``."""

    welcome: Welcome
    """The hub's answer to our latest Hello"""

    def __init__(
        self,
        address: str,
        handler: Handler,
        security: ClientSecurity | None,
        limits: Limits,
        reconnect_s: float,
        hello: Callable[[], Hello],
    ) -> None:
        self.address = address
        self.traffic = Traffic()
        self._handler = handler
        self._security = security
        self._limits = limits
        self._reconnect_s = reconnect_s
        self._hello = hello
        self._report: Report = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._link: Link | None = None
        self._welcomed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._failure: BaseException | None = None
        self._talk = Conversation(
            f"hub at {address}",
            self._send,
            self._flush_soon,
            on_call=self._on_call,
            on_note=self._on_note,
            on_bug=self._end,
            on_bad=lambda bad: log.error("the hub sent a message that breaks the rules: %s", bad),
            limits=limits,
            traffic=self.traffic,
            holding=True,
        )

    @classmethod
    async def connect(
        cls,
        address: str,
        hello: Hello,
        *,
        handler: Handler,
        security: ClientSecurity | None = None,
        timeout_s: float = 30.0,
        limits: Limits = DEFAULT_LIMITS,
        reconnect_s: float = 0.0,
        refreshed_hello: Callable[[], Hello] | None = None,
    ) -> HubClient:
        """Returns once the hub welcomed us; waits up to ``timeout_s`` for a hub that is not there yet.

        ``handler`` gets the hub's calls and notes, never before this returns. With ``reconnect_s`` a lost hub may come
        back within that time: it gets ``refreshed_hello()`` and every unanswered call made with ``retry``. Raises
        ``ConnectionLost`` when nobody answers or our key is refused, ``RemoteError`` when the hub refuses the Hello.
        """
        client = cls(address, handler, security, limits, reconnect_s, refreshed_hello or (lambda: hello))
        try:
            client.welcome = await client._say_hello(hello, timeout_s)
        except BaseException as error:
            client._end(error)
            raise
        client._welcomed = True
        client._start(client._beat())
        asyncio.get_running_loop().call_soon(client._talk.release)  # after our caller got the client
        return client

    def call(self, message: Message, timeout_s: float, *, retry: bool = False) -> Coroutine[Any, Any, Message]:
        """The hub's reply. With ``retry`` (for what is idempotent) it is sent again when the hub comes back.

        Raises ``RemoteError``, ``DeadlineExceeded``, ``ConnectionLost``; ``BadMessage`` if it cannot be sent.
        """
        return self._talk.call(message, timeout_s, retry=retry)

    async def note(self, message: Message) -> None:
        """Returns once the message is on its way; waits while the hub takes none. Raises ``ConnectionLost``."""
        await self._talk.note(message)

    def set_report(self, report: Report) -> None:
        """What the heartbeats carry from now on."""
        self._report = dict(report)
        PROCESS.tell("report", report)

    async def wait_closed(self) -> None:
        """Returns after ``close``; raises what ended the connection (or the handler) otherwise."""
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure

    async def close(self, timeout_s: float = 5.0) -> None:
        """Send what waits, say goodbye and disconnect; gives up what is unsent after ``timeout_s``. Idempotent."""
        deadline = time.monotonic() + timeout_s
        connected = not self._ended.is_set() and not self._talk.suspended
        if connected:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._talk.outbox.drained()
                    await self._talk.note(Goodbye())
            except (TimeoutError, ConnectionLost) as error:
                log.warning("closed without a goodbye to the hub at %s: %s", self.address, error)
        self._end(None, max(0.0, deadline - time.monotonic()) if connected else 0.0)
        await terminate(self._context)

    # ---------------------------------------------------------------------------------------------- connection

    async def _say_hello(self, hello: Hello, timeout_s: float) -> Welcome:
        self._link = link = Link(
            self._context,
            self.address,
            self._limits,
            self._security,
            self._talk.receive,
            self._room,
            self._broken,
            self._end,
        )
        try:
            reply = await self._talk.call(hello, timeout_s, first=True)
        except DeadlineExceeded:
            raise ConnectionLost(f"no hub at {self.address} within {timeout_s:g} s: {link.trouble}") from None
        if not isinstance(reply, Welcome):
            raise BadMessage(f"the hub answered Hello with {type(reply).__name__}, not Welcome")
        return reply

    def _broken(self, link: Link, why: str) -> None:
        """The connection broke: reconnect if that is allowed, else end."""
        if link is not self._link or self._ended.is_set() or self._talk.suspended:
            return
        lost = ConnectionLost(f"lost the hub at {self.address}: {why}")
        if not self._welcomed or not self._reconnect_s:
            self._end(lost)
            return
        log.warning("%s; trying to reach it again for %g s", lost, self._reconnect_s)
        self._welcomed = False
        self._talk.suspend(lost)
        self._start(self._reconnect(lost))

    async def _reconnect(self, lost: ConnectionLost) -> None:
        deadline = time.monotonic() + self._reconnect_s
        while (left_s := deadline - time.monotonic()) > 0:
            assert self._link is not None
            self._link.close()
            try:
                self.welcome = await self._say_hello(self._hello(), left_s)
            except RemoteError as refused:
                # a hub that still takes our old connection for alive will notice soon
                log.warning("the hub at %s refused our return: %s", self.address, refused)
                await asyncio.sleep(min(RETRY_INTERVAL_S, left_s))
                continue
            except ConnectionLost:
                break
            self._welcomed = True
            self._talk.resume()
            self._talk.release()
            return
        raise ConnectionLost(f"{lost}; it did not come back within {self._reconnect_s:g} s") from lost

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.welcome.heartbeat_interval_s)
            if self._talk.suspended or self._link is None:
                continue
            if self._talk.silent_s > self.welcome.heartbeat_timeout_s:
                self._link.stream.read(SILENCE_READ)  # if it was this loop that slept, the hub's messages are here
            if self._talk.silent_s > self.welcome.heartbeat_timeout_s:
                self._broken(self._link, f"silent for {self._talk.silent_s:.1f} s")
            elif not len(self._talk.outbox):
                with suppress(ConnectionLost):  # whoever noticed it sees to it
                    await self._talk.note(Heartbeat({**PROCESS.about(), **self._report}))

    # ---------------------------------------------------------------------------------------------- messages

    def _send(self, frames: Sequence[Buffer]) -> bool:
        assert self._link is not None
        return self._link.stream.try_send(frames)

    def _flush_soon(self) -> None:
        assert self._link is not None
        self._link.stream.look_soon()

    def _room(self) -> None:
        self._talk.outbox.flush()

    async def _on_call(self, message: Message) -> Message:
        reply = await self._handler(message)
        if reply is None:
            raise TypeError(f"the handler returned None for the call {type(message).__name__}: calls need a reply")
        return reply

    def _on_note(self, message: Message) -> Coroutine[Any, Any, None] | None:
        if isinstance(message, Heartbeat):
            return None
        if not isinstance(message, ErrorReply):
            return self._take_note(message)
        if message.code == NOT_CONNECTED and self._link is not None:
            self._broken(self._link, message.message)
        else:
            log.warning("the hub refused a note: %s: %s", message.code, message.message)
        return None

    async def _take_note(self, message: Message) -> None:
        await self._handler(message)

    # ---------------------------------------------------------------------------------------------- ends

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._stopped)

    def _stopped(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)

    def _end(self, error: BaseException | None, linger_s: float = 0.0) -> None:
        """Once: everything that waits fails, and ``wait_closed`` gets ``error``."""
        if self._ended.is_set():
            return
        self._failure = error
        self._ended.set()
        lost = ConnectionLost(f"this client of the hub at {self.address} was closed")
        if error is not None:
            lost = error if isinstance(error, ConnectionLost) else ConnectionLost(f"this client died: {error!r}")
        self._talk.close(lost)
        for task in self._tasks:
            task.cancel()
        if self._link is not None:
            self._link.close(linger_s)
        if error is not None:
            self._context.term()  # nothing lingers, so this returns at once
