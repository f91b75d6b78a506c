"""The door to one server: requests enter in bunches, by the rule of ``slime_async.bunches``.

Consumes requests; lets those that wait in together, once they are enough for the number of those inside, which falls as
answers end, or once the first has waited for twice as long as a bunch should take to gather, but ``wait_s`` at most.
So it holds nobody for whom there is room for longer, whoever is inside. While the server is paused the door is shut:
answers that the pause cut short come back then, and go first.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from slime_async.bunches import Bunches


class Door:
    """Use it from one event loop."""

    def __init__(self, fraction: float, wait_s: float) -> None:
        self.capacity = math.inf
        """Requests that the server runs at once; others wait here, not in its queue"""
        self._bunches = Bunches(fraction, wait_s)
        self._is_open = True
        self._inside = 0
        self._waiting: OrderedDict[str, asyncio.Future[None]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def passed(self, request_id: str, *, again: bool = False) -> AsyncIterator[None]:
        """Around all that a request does in the server. One that was cut short goes ``again`` before the others."""
        await self._enter(request_id, again)
        entered = time.monotonic()
        try:
            yield
        finally:
            self._bunches.ended(time.monotonic() - entered)
            self._leave()

    def shut(self) -> None:
        """Nobody enters any more."""
        self._is_open = False

    def open(self) -> None:
        """Those who waited may enter."""
        self._is_open = True
        self._look()

    def excuse(self, request_id: str) -> None:
        """Let this one in, if it waits: it will ask nothing of the server."""
        turn = self._waiting.pop(request_id, None)
        if turn is not None:
            self._let_in(turn)

    def excuse_all(self) -> None:
        """The same of all that wait."""
        self._let_in_first(math.inf)

    async def _enter(self, request_id: str, again: bool) -> None:
        turn = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        if again:
            self._waiting.move_to_end(request_id, last=False)
        self._look()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had been let in
                self._leave()
            elif self._waiting.get(request_id) is turn:
                del self._waiting[request_id]
            raise

    def _leave(self) -> None:
        self._inside -= 1
        self._look()

    @property
    def _room(self) -> float:
        return self.capacity - self._inside

    def _look(self) -> None:
        if not self._waiting or self._room <= 0 or not self._is_open:
            return
        if entering := self._bunches.entering(len(self._waiting), self._inside, self._room):
            self._let_in_first(entering)
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._bunches.patience_s, self._waited)

    def _waited(self) -> None:
        """Long enough: those for whom there is room enter."""
        self._timer = None
        if self._is_open:
            self._let_in_first(self._room)

    def _let_in_first(self, most: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while most > 0 and self._waiting:
            most -= self._let_in(self._waiting.popitem(last=False)[1])

    def _let_in(self, turn: asyncio.Future[None]) -> bool:
        """Whether it had not given up."""
        if turn.done():
            return False
        turn.set_result(None)
        self._inside += 1
        return True
