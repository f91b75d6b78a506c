"""The hub's client for synchronous code: the learner's main thread trains, a thread of ours talks.

Heartbeats go on while the main thread computes, because the client lives in an event loop of its own. Nothing dies
unseen: what ended the connection or the thread is raised by the next ``call``, ``begin``, ``note`` or ``check``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from slime_async.protocol import Hello, Message, Report, Welcome
from slime_async.transport.client import Handler, HubClient
from slime_async.transport.codec import DEFAULT_LIMITS, Limits
from slime_async.transport.errors import ConnectionLost, DeadlineExceeded
from slime_async.transport.security import ClientSecurity

T = TypeVar("T")

GRACE_S = 10.0
"""How much later than its own deadline the client's loop may answer before it counts as stuck"""


class BlockingClient:
    """A ``HubClient`` behind blocking methods, callable from any thread. Also a context manager."""

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        handler: Handler,
        security: ClientSecurity | None = None,
        timeout_s: float = 30.0,
        limits: Limits = DEFAULT_LIMITS,
        reconnect_s: float = 0.0,
        refreshed_hello: Callable[[], Hello] | None = None,
    ) -> None:
        """As ``HubClient.connect``; ``handler`` and ``refreshed_hello`` run in the client's thread."""
        self.address = address
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="hub-client", daemon=True)
        self._thread.start()
        connecting = HubClient.connect(
            address,
            hello,
            handler=handler,
            security=security,
            timeout_s=timeout_s,
            limits=limits,
            reconnect_s=reconnect_s,
            refreshed_hello=refreshed_hello,
        )
        try:
            self._client = self._wait(asyncio.run_coroutine_threadsafe(connecting, self._loop), timeout_s, "connect")
        except BaseException:
            self._stop()
            raise
        self._closed = asyncio.run_coroutine_threadsafe(self._client.wait_closed(), self._loop)

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def welcome(self) -> Welcome:
        """The hub's answer to our latest Hello."""
        return self._client.welcome

    def check(self) -> None:
        """Raises what ended the connection, if it has ended."""
        if self._closed.done():
            self._closed.result()
            raise ConnectionLost(f"this client of the hub at {self.address} was closed")
        if not self._thread.is_alive():
            raise ConnectionLost(f"the thread that talks to the hub at {self.address} died")

    def call(self, message: Message, timeout_s: float, *, retry: bool = False) -> Message:
        """As ``HubClient.call``."""
        replying = self._submit(self._client.call(message, timeout_s, retry=retry))
        return self._wait(replying, timeout_s, type(message).__name__)

    def begin(self, message: Message, timeout_s: float, *, retry: bool = False) -> concurrent.futures.Future[Message]:
        """A call whose reply, or error, the future will hold, after ``timeout_s`` at the latest."""
        return self._submit(self._client.call(message, timeout_s, retry=retry))

    def note(self, message: Message, timeout_s: float = 30.0) -> None:
        """As ``HubClient.note``; raises ``DeadlineExceeded`` when the hub takes nothing for ``timeout_s``."""
        self._wait(self._submit(self._client.note(message)), timeout_s, type(message).__name__)

    def set_report(self, report: Report) -> None:
        """What the heartbeats carry from now on."""
        self.check()
        self._loop.call_soon_threadsafe(self._client.set_report, report)

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run ``work`` on the client's loop, beside the caller."""
        try:
            self.check()
        except BaseException:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, timeout_s: float = 5.0) -> None:
        """As ``HubClient.close``, and end the thread. Idempotent; raises nothing about a connection lost before."""
        if self._thread.is_alive():
            try:
                self._wait(
                    asyncio.run_coroutine_threadsafe(self._client.close(timeout_s), self._loop), timeout_s, "close"
                )
            finally:
                self._stop()

    def _wait(self, future: concurrent.futures.Future[T], timeout_s: float, what: str) -> T:
        try:
            return future.result(timeout_s + GRACE_S)
        except TimeoutError:
            if future.done():
                raise  # the client's own deadline
            future.cancel()
            raise DeadlineExceeded(
                f"{what} to the hub at {self.address}: no sign for {timeout_s + GRACE_S:g} s"
            ) from None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _stop(self) -> None:
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result(GRACE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(GRACE_S)
            self._loop.close()

    async def _finish(self) -> None:
        """Cancel what still runs on the loop, so that nothing is destroyed pending."""
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_default_executor()
