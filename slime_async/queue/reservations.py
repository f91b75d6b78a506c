"""Who generates what: the volatile half of the queue's state. A restarted hub starts with an empty table.

A sample is *missing* until it is granted, then *held* by one actor until it is accepted or given back; given back, it
is missing again, with its next attempt. A reservation whose sample was accepted from another attempt, or whose group
was dropped, is *void*: it no longer counts for pacing, but it still occupies its actor's slot until that actor
delivers, fails or dies.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from slime_async.trajectory import TrajectoryKey


@dataclass(slots=True)
class _Sample:
    """One that was neither accepted nor discarded."""

    attempts: int = 0
    """Granted so far; the number of the next attempt"""
    failures: int = 0
    held: int | None = None
    """The attempt that runs; None while missing"""


@dataclass(slots=True)
class _Holder:
    actor: str
    started: bool = False
    void: bool = False


class ReservationTable:
    """Samples to generate, of training or of evaluations; ``limits`` of either are not its business."""

    def __init__(self) -> None:
        self._samples: dict[TrajectoryKey, _Sample] = {}
        self._missing: list[tuple[int, TrajectoryKey]] = []
        """Heap by the order of grants; entries of samples that are no longer missing are skipped"""
        self._holders: dict[tuple[TrajectoryKey, int], _Holder] = {}
        self._by_actor: dict[str, dict[tuple[TrajectoryKey, int], None]] = {}
        self.held = 0
        """Reservations that count"""
        self.running = 0
        """Of these, those whose generation began"""

    @property
    def missing(self) -> int:
        return len(self._samples) - self.held

    @property
    def busy_actors(self) -> int:
        return len(self._by_actor)

    def outstanding(self, actor: str) -> int:
        """Slots of ``actor`` that are taken, void reservations included."""
        return len(self._by_actor.get(actor, ()))

    def add(self, keys: Iterable[TrajectoryKey]) -> None:
        """Samples that are to be generated from now on."""
        for key in keys:
            self._samples[key] = _Sample()
            heapq.heappush(self._missing, (abs(key.task), key))

    def take(self, actor: str) -> tuple[TrajectoryKey, int] | None:
        """Grant the first missing sample: its key and attempt; None when none is missing."""
        while self._missing:
            _, key = heapq.heappop(self._missing)
            sample = self._samples.get(key)
            if sample is None or sample.held is not None:
                continue
            attempt = sample.held = sample.attempts
            sample.attempts += 1
            self._holders[key, attempt] = _Holder(actor)
            self._by_actor.setdefault(actor, {})[key, attempt] = None
            self.held += 1
            return key, attempt
        return None

    def adopt(self, key: TrajectoryKey, attempt: int, actor: str) -> None:
        """``actor`` works on this already, granted before its connection broke or the hub restarted.

        It counts when its sample is missing now; otherwise it only takes the actor's slot.
        """
        if (key, attempt) in self._holders:
            return
        sample = self._samples.get(key)
        counts = sample is not None and sample.held is None
        if sample is not None:
            sample.attempts = max(sample.attempts, attempt + 1)
            sample.held = attempt if counts else sample.held
        self._holders[key, attempt] = _Holder(actor, started=True, void=not counts)
        self._by_actor.setdefault(actor, {})[key, attempt] = None
        self.held += counts
        self.running += counts

    def start(self, key: TrajectoryKey, attempt: int) -> None:
        holder = self._holders.get((key, attempt))
        if holder is not None and not holder.started:
            holder.started = True
            self.running += not holder.void

    def give_back(self, key: TrajectoryKey, attempt: int, *, failed: bool = False) -> int | None:
        """The attempt came to nothing: the sample is missing again. Its failures so far; None if it did not count."""
        if not self._release(key, attempt):
            return None
        sample = self._samples[key]
        sample.held = None
        sample.failures += failed
        heapq.heappush(self._missing, (abs(key.task), key))
        return sample.failures

    def free_slot(self, key: TrajectoryKey, attempt: int, actor: str) -> None:
        """``actor`` delivered this attempt: nobody's sample changes, but its slot is free."""
        holder = self._holders.get((key, attempt))
        if holder is not None and holder.actor == actor:
            self._void(holder)
            self._release(key, attempt)

    def close(self, key: TrajectoryKey) -> None:
        """The sample is not to be generated any more: it was accepted, or its group is gone."""
        sample = self._samples.pop(key, None)
        if sample is None or sample.held is None:
            return
        holder = self._holders.get((key, sample.held))
        if holder is not None:
            self._void(holder)

    def lose_actor(self, actor: str) -> tuple[TrajectoryKey, ...]:
        """Everything that ``actor`` held is missing again."""
        held = tuple(self._by_actor.get(actor, ()))
        return tuple(key for key, attempt in held if self.give_back(key, attempt) is not None)

    def _void(self, holder: _Holder) -> None:
        if not holder.void:
            holder.void = True
            self.held -= 1
            self.running -= holder.started

    def _release(self, key: TrajectoryKey, attempt: int) -> bool:
        """Take the reservation from its actor; whether it counted."""
        holder = self._holders.pop((key, attempt), None)
        if holder is None:
            return False
        mine = self._by_actor[holder.actor]
        del mine[key, attempt]
        if not mine:
            del self._by_actor[holder.actor]
        counted = not holder.void
        self._void(holder)
        return counted
