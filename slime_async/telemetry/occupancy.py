"""Stretches of time in which any of several overlapping things goes on: one span each, however many overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from slime_async.telemetry.spans import PIECE_NS, SpanRecorder


class Occupancy:
    """Spans of "any at all" and of "none", each if it has a name: what is counted may overlap, the spans do not.

    ``enter`` and ``leave`` as things begin and end; ``close`` writes what is still open.
    """

    def __init__(self, recorder: SpanRecorder, busy: str | None, idle: str | None = None) -> None:
        self._recorder = recorder
        self._names = (idle, busy)
        self._count = 0
        self._since_ns = time.monotonic_ns()
        self._lock = threading.Lock()

    @contextmanager
    def inside(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        self._move(+1)

    def leave(self) -> None:
        assert self._count > 0, f"nothing is in {self._names}"
        self._move(-1)

    def tick(self) -> None:
        """Nothing changed, but the stretch may be long enough for a piece."""
        self._move(0)

    def close(self) -> None:
        with self._lock:
            self._write(time.monotonic_ns())

    def _move(self, by: int) -> None:
        with self._lock:
            now = time.monotonic_ns()
            changes = not self._count or not self._count + by
            if changes or now - self._since_ns > PIECE_NS:
                self._write(now)
            self._count += by

    def _write(self, now_ns: int) -> None:
        name = self._names[self._count > 0]
        if name is not None and now_ns > self._since_ns:
            self._recorder.add(name, self._since_ns, now_ns)
        self._since_ns = now_ns
