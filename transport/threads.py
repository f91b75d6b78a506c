"""Blocking work on a thread of its own, its result or its death handed over as a future.

Daemon threads, because a collective whose peer is gone may never return: it must not keep the process from leaving.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_daemon_thread(function: Callable[[], T], name: str) -> Future[T]:
    """Run ``function`` on a new daemon thread called ``name``; whatever it raises is the future's exception."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - the border of a thread: the future carries it to whoever waits
            # without this frame, which knows the future, the two are no cycle: what the error's frames hold can go
            future.set_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name=name, daemon=True).start()
    return future
