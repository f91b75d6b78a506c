"""An engine in virtual time: all running requests gain a token per step, and a step takes longer the more there are,
and the longer their contexts have become.

Its *position* counts the steps done since it began; a request that entered at position p with n steps to do is done at
p + n. So nothing has to be said of single tokens: only arrivals, departures, pauses and new weights are events.
Requests enter between two steps, and what entering costs, everything that runs waits for. They enter in bunches, by the
rule of the actors' own door.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

from slime_async.bunches import Bunches
from slime_async.rows import most_rows
from slime_async.simulate.scenario import EngineModel

STEP_FRACTION = 1e-6
"""Of a step, less than which is no difference between two positions"""


@dataclass(slots=True)
class Request:
    """One turn."""

    episode: int
    """Whose"""
    tokens: float
    begun: float = 0.0
    """The position where it entered"""
    begun_s: float = 0.0
    """When that was"""
    done: bool = False


class SimulatedEngine:
    """One engine. Every method is told the time, which never runs backwards."""

    def __init__(self, model: EngineModel, steps: dict[int, tuple[float, float]]) -> None:
        self._model = model
        self._steps = steps
        """Shared by all engines: ``model.step_by_context`` by rows"""
        self._position = 0.0
        self._stall_s = 0.0
        """Left of what requests cost that have entered"""
        self._filled_at = -1.0
        """The position of the last prefill"""
        self.slowdown = 1.0
        """How many times as long everything takes now"""
        self._time_s = 0.0
        self._ends: list[tuple[float, int, Request]] = []
        self._oldest: deque[Request] = deque()
        """Of an engine that pads: those that run in the order in which they entered, and some that are done"""
        self._begun_sum = 0.0
        """Of all that run"""
        self._rows = 0
        """That a step computes: as many as run, and idle ones in an engine that pads"""
        self._bunches = Bunches(model.prefill_fraction, model.prefill_wait_s)
        self._at_door: deque[Request] = deque()
        self._let_in_by_s = math.inf
        """When those that wait at the door, and for whom there is room, have waited long enough"""
        self._versions: list[tuple[float, int]] = []
        """(position, version) from which on tokens come from it"""
        self._count = 0
        self.paused = False
        self.down = False
        self.busy_s = 0.0
        """With any request, not paused"""
        self.epoch = 0
        """Changes with everything that moves the next end"""

    @property
    def running(self) -> int:
        return len(self._ends)

    @property
    def computing(self) -> bool:
        return bool(self._ends) and not self.paused and not self.down

    def slow_down(self, now: float, slowdown: float) -> None:
        """Everything takes ``slowdown`` times as long from now on."""
        self._advance(now)
        self.slowdown = slowdown
        self.epoch += 1

    def submit(self, request: Request, now: float) -> None:
        self._advance(now)
        self._at_door.append(request)
        self._look()

    def next_end_s(self) -> float:
        """When the next request is done, or those that wait have waited long enough, if nothing else happens."""
        if not self.computing:
            return math.inf
        steps = max(0.0, self._ends[0][0] - self._position)
        first_s, slope = self._step()
        end_s = self._time_s + (self._stall_s + steps * (first_s + slope * steps / 2)) * self.slowdown
        return min(end_s, max(self._time_s, self._let_in_by_s))

    def finish(self, now: float) -> list[Request]:
        """Requests that are done by ``now``."""
        self._advance(now)
        done = []
        while self._ends and self._stall_s <= 1e-9 and self._ends[0][0] <= self._position + STEP_FRACTION:
            request = heapq.heappop(self._ends)[2]
            done.append(request)
            request.done = True
            self._begun_sum -= request.begun
            self._bunches.ended(now - request.begun_s)
            self._count_rows()
            self.epoch += 1
            self._look()
        if self._let_in_by_s <= now:
            self._let_in(self._room)
        return done

    def use(self, version: int, now: float) -> None:
        self._advance(now)
        self._versions.append((self._position, version))

    def pause(self, now: float, paused: bool) -> None:
        self._advance(now)
        self.paused = paused
        self.epoch += 1
        if not paused:
            self._let_in_by_s = math.inf
            self._look()

    def fail(self, now: float) -> None:
        """Everything it had is gone."""
        self._advance(now)
        self.down = True
        self._ends.clear()
        self._oldest.clear()
        self._begun_sum = 0.0
        self._rows = 0
        self._at_door.clear()
        self._let_in_by_s = math.inf
        self._stall_s = 0.0
        self.epoch += 1

    def restart(self, version: int, now: float) -> None:
        self._advance(now)
        self.down = False
        self.use(version, now)

    def versions_of(self, request: Request) -> list[tuple[int, float]]:
        """(version, tokens) of a request that is done, ascending."""
        end = request.begun + request.tokens
        first = max(0, bisect_right(self._versions, (request.begun, math.inf)) - 1)
        found = []
        for i in range(first, len(self._versions)):
            start, version = self._versions[i]
            until = self._versions[i + 1][0] if i + 1 < len(self._versions) else math.inf
            tokens = min(end, until) - max(request.begun, start)
            if tokens > STEP_FRACTION:
                found.append((version, tokens))
            if until >= end:
                break
        return found

    @property
    def _room(self) -> int:
        return self._model.max_running - self.running

    def _look(self) -> None:
        """Let those in that wait at the door, if they are enough and it is open, as it is but in pauses."""
        room = self._room
        if not self._at_door or room <= 0 or self.paused:
            return
        if entering := self._bunches.entering(len(self._at_door), self.running, room):
            self._let_in(entering)
        elif self._let_in_by_s == math.inf:
            self._let_in_by_s = self._time_s + self._bunches.patience_s
            self.epoch += 1

    def _let_in(self, most: int) -> None:
        for _ in range(min(most, len(self._at_door))):
            self._enter(self._at_door.popleft())
        self._let_in_by_s = math.inf

    def _enter(self, request: Request) -> None:
        model = self._model
        request.begun = float(math.ceil(self._position - STEP_FRACTION))
        request.begun_s = self._time_s
        if model.prefills:
            self._stall_s += model.request_s + (model.prefill_s if request.begun != self._filled_at else 0.0)
            self._filled_at = request.begun
        self._count += 1
        if model.pads:
            self._oldest.append(request)
        self._begun_sum += request.begun
        heapq.heappush(self._ends, (request.begun + request.tokens - model.prefills, self._count, request))
        self._count_rows()
        self.epoch += 1

    def _count_rows(self) -> None:
        running = len(self._ends)
        self._rows = max(running, min(self._rows, most_rows(running))) if self._model.pads and running else running

    def _advance(self, now: float) -> None:
        if self.computing:
            done_s = (now - self._time_s) / self.slowdown
            stalled_s = min(done_s, self._stall_s)
            self._stall_s -= stalled_s
            first_s, slope = self._step()
            left_s = done_s - stalled_s
            # left_s = n first_s + slope n² / 2, solved for n without the difference of near numbers
            self._position += 2 * left_s / (first_s + math.sqrt(first_s * first_s + 2 * slope * left_s))
            self.busy_s += now - self._time_s
        self._time_s = now

    def _step(self) -> tuple[float, float]:
        """Seconds of the next step, and how much longer each after it is than the one before."""
        step = self._steps.get(self._rows)
        if step is None:
            step = self._steps[self._rows] = self._model.step_by_context(self._rows)
        bare_s, slope = step
        return (bare_s + slope * self._context(), slope) if slope else step

    def _context(self) -> float:
        if not self._model.pads:
            return max(0.0, self._position - self._begun_sum / len(self._ends))
        while self._oldest[0].done:
            self._oldest.popleft()
        return max(0.0, self._position - self._oldest[0].begun)
