"""Calls and notes with one other side, either way: what client and server have in common.

What comes in is handed to the handlers in the order of arrival. A handler returns its answer, or a coroutine that has
to wait for it and becomes a task of its own, so that a call that waits long blocks nobody. Each call that goes out has
a deadline; when the other side leaves, all of them fail at once.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from slime_async.protocol import Delivered, ErrorReply, Message
from slime_async.transport.codec import SHARED_CALLS, Buffer, Envelope, Limits, decode, encode
from slime_async.transport.errors import BadMessage, ConnectionLost, DeadlineExceeded, RemoteError
from slime_async.transport.stream import Outbox, Outgoing

NOT_CONNECTED = "NotConnected"
"""Code of the ``ErrorReply`` to whoever was not welcomed, or is no longer"""
ERROR_TEXT_CHARACTERS = 4000
"""Longer error texts are cut"""

MAX_UNATTENDED = 256
"""Notes that may wait for room with nobody waiting for them"""

TIMER_RESOLUTION_S = 0.001
"""Of uvloop: timers may be this early"""

ANSWERABLE = (ValueError, RemoteError, DeadlineExceeded, ConnectionLost)
"""What a handler may raise to answer its caller with an ``ErrorReply``; anything else is a bug of the handler's"""


def error_reply(error: BaseException) -> ErrorReply:
    """The reply that says ``error`` to the caller; an error of a third side keeps its own code."""
    code, text = (error.code, error.message) if isinstance(error, RemoteError) else (type(error).__name__, str(error))
    text = text.encode(errors="replace").decode()  # lone surrogates, of file names say, are no UTF-8
    return ErrorReply(code, text[:ERROR_TEXT_CHARACTERS])


Answer = Message | Coroutine[Any, Any, Message]
OnCall = Callable[[Message], Answer]
OnNote = Callable[[Message], Coroutine[Any, Any, None] | None]


@dataclass(slots=True)
class _Call:
    kind: type[Message]
    frames: Sequence[Buffer]
    """While they may have to be sent (again)"""
    timeout_s: float
    deadline: float
    reply: asyncio.Future[Message]
    retry: bool
    sending: asyncio.Future[None] | None = None


@dataclass(slots=True)
class _Acknowledgement:
    """A message that answers all calls which it names when it leaves: equal ones that come meanwhile join it."""

    reply: Delivered
    calls: list[int]

    def __call__(self) -> Sequence[Buffer]:
        first, *others = self.calls
        return encode(self.reply, call_id=first, reply=True, also=others)


@dataclass(slots=True)
class Traffic:
    """Counters of one side, for its statistics."""

    messages_in: int = 0
    messages_out: int = 0
    blocked: int = 0
    """Messages that had to wait for room, each counted once"""
    bad: int = 0
    """Messages that broke the rules of the wire"""
    late: int = 0
    """Replies that came after their call had ended"""
    ignored: int = 0
    """Messages of senders that were cut off, or never welcomed"""


class Conversation:
    """One side of one connection.

    ``on_call`` and ``on_note`` handle what comes in; ``on_bug`` gets what they raise beyond ``ANSWERABLE``; ``on_bad``
    gets every message that cannot be understood, after its sender was told. While ``holding``, replies are taken but
    calls and notes wait for ``release``.
    """

    def __init__(
        self,
        other: str,
        send: Callable[[Sequence[Buffer]], bool],
        flush_soon: Callable[[], None],
        *,
        on_call: OnCall,
        on_note: OnNote,
        on_bug: Callable[[BaseException], None],
        on_bad: Callable[[BadMessage], None],
        limits: Limits,
        traffic: Traffic,
        holding: bool = False,
    ) -> None:
        self.other = other
        self.outbox = Outbox(send, flush_soon, self._count_blocked)
        self.heard_at = time.monotonic()
        self.suspended = False
        self.holding = holding
        self._held: list[Envelope] = []
        self._on_call, self._on_note, self._on_bug, self._on_bad = on_call, on_note, on_bug, on_bad
        self._limits = limits
        self._traffic = traffic
        self._ids = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._acknowledgement: _Acknowledgement | None = None
        """The latest"""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed: Exception | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def silent_s(self) -> float:
        """Since the last message came."""
        return time.monotonic() - self.heard_at

    @property
    def handling(self) -> int:
        """Calls and notes that came and are not done, or whose answer waits for room."""
        return len(self._tasks) + len(self.outbox)

    # ---------------------------------------------------------------------------------------------- going out

    async def call(self, message: Message, timeout_s: float, *, retry: bool = False, first: bool = False) -> Message:
        """The reply. Raises ``RemoteError``, ``DeadlineExceeded``, ``ConnectionLost``; ``BadMessage`` if unsendable.

        While suspended, calls wait (``first`` ones go through) and those with ``retry`` survive.
        """
        self._check_open()
        call_id = next(self._ids)
        frames = encode(message, call_id=call_id, limits=self._limits)
        deadline = time.monotonic() + timeout_s
        call = _Call(type(message), frames, timeout_s, deadline, self._loop.create_future(), retry)
        self._calls[call_id] = call
        if self._timer is None or deadline < self._timer_at:
            self._wake_at(deadline)
        try:
            if first or not self.suspended:
                call.sending = self._put(frames)
                if not retry:
                    call.frames = ()
            del frames  # large ones are not needed while the reply is waited for
            return await call.reply
        finally:
            self._calls.pop(call_id, None)
            if call.sending is not None:
                call.sending.cancel()

    async def note(self, message: Message) -> None:
        """Returns once the message is on its way. Raises ``ConnectionLost`` and, if unsendable, ``BadMessage``."""
        self._check_open()
        if self.suspended:
            raise ConnectionLost(f"{self.other} is not connected now")
        await self._put(encode(message, limits=self._limits))

    def note_nowait(self, message: Message) -> bool:
        """Whether the note will be sent, as long as the connection holds. Raises ``BadMessage`` if unsendable."""
        if self._closed is not None or self.suspended or len(self.outbox) >= MAX_UNATTENDED:
            return False
        self._put(encode(message, limits=self._limits))
        return True

    def _put(self, message: Outgoing) -> asyncio.Future[None]:
        self._traffic.messages_out += 1
        return self.outbox.put(message)

    def _count_blocked(self, messages: int) -> None:
        self._traffic.blocked += messages

    def _wake_at(self, deadline: float) -> None:
        """One timer for all calls, at the first deadline: most are answered long before, and one for each is dear."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._timer = None
        due = time.monotonic() + TIMER_RESOLUTION_S
        waiting = [call for call in self._calls.values() if not call.reply.done()]
        for call in waiting:
            if call.deadline <= due:
                problem = f"{self.other} did not answer {call.kind.__name__} within {call.timeout_s:g} s"
                call.reply.set_exception(DeadlineExceeded(problem))
        if later := [call.deadline for call in waiting if call.deadline > due]:
            self._wake_at(min(later))

    def _check_open(self) -> None:
        if self._closed is not None:
            raise ConnectionLost(str(self._closed)) from self._closed

    # ---------------------------------------------------------------------------------------------- coming in

    def receive(self, frames: Sequence[Buffer]) -> None:
        """Take one message."""
        self.heard_at = time.monotonic()
        self._traffic.messages_in += 1
        try:
            envelope = decode(frames, self._limits)
        except BadMessage as bad:
            self._refuse(bad)
        else:
            self.take(envelope)

    def take(self, envelope: Envelope) -> None:
        if envelope.reply:
            message = envelope.message
            for call_id in (envelope.call_id, *envelope.also):
                self._settle(
                    call_id,
                    RemoteError(message.code, message.message) if isinstance(message, ErrorReply) else message,
                )
        elif self.holding:
            self._held.append(envelope)
        else:
            self._handle(envelope.message, envelope.call_id)

    def _handle(self, message: Message, call_id: int) -> None:
        try:
            outcome = self._on_call(message) if call_id else self._on_note(message)
        except Exception as error:  # noqa: BLE001 - as of a task: its caller is told, and whoever owns this
            self._failed(error, call_id)
        else:
            if isinstance(outcome, Message):
                self._reply(outcome, call_id)
            elif outcome is not None:
                task = self._loop.create_task(outcome)
                self._tasks.add(task)
                task.add_done_callback(partial(self._done, call_id))

    def _done(self, call_id: int, task: asyncio.Task[Message | None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._failed(error, call_id)
        elif (reply := task.result()) is not None:
            self._reply(reply, call_id)

    def _failed(self, error: BaseException, call_id: int) -> None:
        """A handler raised: its sender is told; of bugs, whoever owns this conversation too."""
        answerable = isinstance(error, ANSWERABLE)
        if answerable or call_id:
            self._reply(error_reply(error), call_id)
        if not answerable:
            self._on_bug(error)

    def _settle(self, call_id: int, outcome: Message | Exception) -> None:
        call = self._calls.get(call_id)
        if call is None or call.reply.done():
            self._traffic.late += 1
        elif isinstance(outcome, Exception):
            call.reply.set_exception(outcome)
        else:
            call.reply.set_result(outcome)

    def _refuse(self, bad: BadMessage) -> None:
        self._traffic.bad += 1
        if bad.reply:
            for call_id in (bad.call_id, *bad.also):
                self._settle(call_id, bad)
        self._reply(error_reply(bad), 0 if bad.reply else bad.call_id)
        self._on_bad(bad)

    def _reply(self, reply: Message, call_id: int) -> None:
        """To a call, or about a note (``call_id`` 0). Where there is no room, it waits in the outbox."""
        if self._closed is not None:
            return
        if type(reply) is Delivered and call_id:
            self._acknowledge(reply, call_id)
            return
        is_reply = call_id != 0
        try:
            frames = encode(reply, call_id=call_id, reply=is_reply, limits=self._limits)
        except BadMessage as bad:
            frames = encode(error_reply(bad), call_id=call_id, reply=is_reply)
        self._put(frames)

    def _acknowledge(self, reply: Delivered, call_id: int) -> None:
        """In one message with those before it, while that waits, last."""
        latest = self._acknowledgement
        if latest is None or latest.reply != reply or not self.outbox.ends_with(latest):
            self._acknowledgement = latest = _Acknowledgement(reply, [call_id])
            self._put(latest)
            return
        latest.calls.append(call_id)
        if len(latest.calls) == SHARED_CALLS:
            self._acknowledgement = None
            if not self.outbox.blocked:
                self.outbox.flush()  # the other side goes on with these

    # ---------------------------------------------------------------------------------------------- ends

    def suspend(self, error: Exception) -> None:
        """The connection broke and may come back: fail what cannot be repeated, keep the rest for ``resume``."""
        self.suspended = self.holding = True
        self._held.clear()
        self.outbox.fail(error)
        for call in self._calls.values():
            if not call.retry and not call.reply.done():
                call.reply.set_exception(error)

    def resume(self) -> None:
        """The other side is back: repeat every unanswered call, in the order in which they were made."""
        self.suspended = False
        self.heard_at = time.monotonic()
        for call in self._calls.values():
            if not call.reply.done():
                call.sending = self._put(call.frames)

    def release(self) -> None:
        """Handle what was held back, and everything from now on."""
        self.holding = False
        held, self._held = self._held, []
        for envelope in held:
            self.take(envelope)

    def close(self, error: Exception) -> None:
        """Idempotent. Calls in flight fail with ``error``, handlers are cancelled."""
        if self._closed is None:
            self._closed = error
            if self._timer is not None:
                self._timer.cancel()
            self.outbox.fail(error)
            for call in self._calls.values():
                if not call.reply.done():
                    call.reply.set_exception(error)
            for task in self._tasks:
                task.cancel()
