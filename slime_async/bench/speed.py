"""How fast CPU cores are while something is measured on them: on a shared machine others take from them unseen.

A thread on each core does a fixed piece of work every few hundredths of a second and notes the CPU time that this took.
Waiting for its turn is not in it: it tells how fast the core is, not how busy, and may run beside what is measured.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from statistics import mean
from typing import Self

INTERVAL_S = 0.03
ADDITIONS = 8000
"""One piece of work: some 0.2 ms, so under 1% of a core"""
CLOSE_TIMEOUT_S = 10.0


class CoreSpeeds:
    """Watches cores while it is entered. Linux only."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._samples: dict[int, list[tuple[float, float]]] = {core: [] for core in cores}
        """By core: (time, pieces of work per millisecond)"""
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(core,), name=f"speed of core {core}", daemon=True)
            for core in self._samples
        ]
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    def between(self, began_s: float, ended_s: float, cores: Iterable[int] | None = None) -> float:
        """Pieces of work per millisecond, mean over the time (as of ``time.time``) and the cores, all by default.

        0 where nothing was noted. Raises ``RuntimeError`` when a core could not be watched.
        """
        if self._failure is not None:
            raise RuntimeError(f"the speed of the cores could not be watched: {self._failure}") from self._failure
        noted = [self._samples[core] for core in (self._samples if cores is None else cores)]
        means = [mean(speeds) for one in noted if (speeds := [s for at, s in one if began_s <= at <= ended_s])]
        return mean(means) if means else 0.0

    def _watch(self, core: int) -> None:
        try:
            os.sched_setaffinity(0, {core})  # of this thread
            while not self._closing.wait(INTERVAL_S):
                begun = time.thread_time_ns()
                _work()
                spent_ns = max(1, time.thread_time_ns() - begun)
                self._samples[core].append((time.time(), 1e6 / spent_ns))
        except Exception as error:  # noqa: BLE001 - the border of a thread: whoever asks is told
            self._failure = error


def _work() -> None:
    total = 0
    for i in range(ADDITIONS):
        total += i


def times_as_fast(speed: float, own: float) -> float:
    """What was measured at the speed ``own`` is so many times as fast at ``speed``; 1 where either is unknown, 0."""
    return speed / own if speed and own else 1.0
