"""Says what keeps an actor's event loop from running: usually a user's function that should be in another process.

While the loop stands still, all other episodes do, and so do the heartbeats: the hub takes the actor for dead. A thread
notices, and logs where the loop is.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

LIMIT_S = 5.0
FRAMES = 6
"""Of the stack, from where it stands outwards"""


class LoopWatch:
    """``async with LoopWatch(): …`` in the loop that is watched."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._ran = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loop watch", daemon=True)
        self._watched = 0

    async def __aenter__(self) -> Self:
        self._watched = threading.get_ident()
        self._running = asyncio.create_task(self._run(), name="loop watch")
        self._ran = time.monotonic()
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType) -> None:
        self._stopped.set()
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        self._thread.join(self._limit_s)

    async def _run(self) -> None:
        while True:
            self._ran = time.monotonic()
            await asyncio.sleep(self._limit_s / 4)

    def _watch(self) -> None:
        told = 0.0
        while not self._stopped.wait(self._limit_s / 4):
            ran = self._ran
            stood_s = time.monotonic() - ran
            if stood_s >= self._limit_s and ran != told:
                told = ran
                self._tell(stood_s)

    def _tell(self, stood_s: float) -> None:
        frame = sys._current_frames().get(self._watched)
        where = "".join(traceback.format_stack(frame)[-FRAMES:]) if frame is not None else "its thread is gone\n"
        log.warning(
            "the event loop has not run for %.1f s, and no episode goes on meanwhile; what takes long belongs into a "
            "worker process (task.isolate_reward, task.workers). It is at:\n%s",
            stood_s,
            where.rstrip(),
        )
