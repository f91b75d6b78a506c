"""``HubClient`` for synchronous code: the connection lives on a thread of its own, with its own event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from slime_async.protocol import Hello, Message, Report, Welcome
from slime_async.transport.client import CONNECT_TIMEOUT_S, Handler, HubClient
from slime_async.transport.errors import ConnectionLost

Result = TypeVar("Result")

CLOSE_TIMEOUT_S = 5.0
"""For the goodbye; a hub that is gone does not keep its peers from leaving."""


class BlockingClient:
    """Callable from any thread. ``check`` and every call raise what ended the connection."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hub connection", daemon=True)
        self._thread.start()
        self._client: HubClient | None = None
        self._ended: Future[None] | None = None

    @classmethod
    def connect(cls, address: str, hello: Hello, *, handler: Handler, timeout_s: float = CONNECT_TIMEOUT_S) -> Self:
        """As ``HubClient.connect``; ``handler`` runs on the connection's thread and must not block it."""
        blocking = cls()
        connecting = blocking._submit(HubClient.connect(address, hello, handler=handler, timeout_s=timeout_s))
        try:
            blocking._client = connecting.result(timeout_s * 2)
        except BaseException:
            blocking._stop()
            raise
        blocking._ended = blocking._submit(blocking._client.wait_closed())
        return blocking

    @property
    def client(self) -> HubClient:
        if self._client is None:
            raise ConnectionLost("the connection to the hub was closed")
        return self._client

    @property
    def welcome(self) -> Welcome:
        return self.client.welcome

    def begin(self, message: Message, timeout_s: float) -> Future[Message]:
        """A call whose reply, or error, the future will hold; it cannot take longer than ``timeout_s``."""
        return self._submit(self.client.call(message, timeout_s))

    def call(self, message: Message, timeout_s: float) -> Message:
        """The hub's reply. Raises ``RemoteError``, ``DeadlineExceeded`` or ``ConnectionLost``."""
        return self.begin(message, timeout_s).result()

    def set_report(self, report: Report) -> None:
        self._loop.call_soon_threadsafe(self.client.set_report, report)

    def check(self) -> None:
        """Raise what ended the connection, if anything did."""
        if self._ended is not None and self._ended.done():
            self._ended.result()

    def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            try:
                self._submit(client.close()).result(CLOSE_TIMEOUT_S)
            finally:
                self._stop()

    def _submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()
