"""The door to one server: requests enter in bunches, by the rule of ``slime_async.bunches``.

Consumes requests; lets those that wait in together, once they are enough for the number of those inside, which falls as
answers end, or once the first has waited for twice as long as a bunch should take to gather, but ``wait_s`` at most.
So it holds nobody for longer, whoever is inside.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from slime_async.bunches import Bunches


class Door:
    """Use it from one event loop."""

    def __init__(self, fraction: float, wait_s: float) -> None:
        self._bunches = Bunches(fraction, wait_s)
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Around all that a request does in the server."""
        await self._enter()
        entered = time.monotonic()
        try:
            yield
        finally:
            self._bunches.ended(time.monotonic() - entered)
            self._leave()

    def let_in(self) -> None:
        """All that wait, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._inside += 1

    async def _enter(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._look()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had been let in
                self._leave()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def _leave(self) -> None:
        self._inside -= 1
        self._look()

    def _look(self) -> None:
        if not self._waiting:
            return
        patience_s = self._bunches.patience_s
        if len(self._waiting) >= self._bunches.size(self._inside) or patience_s <= 0:
            self.let_in()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(patience_s, self.let_in)
