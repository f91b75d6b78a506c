"""Where an actor's time goes, as spans; ``slime_async.telemetry.accounting`` says what they add up to."""

from __future__ import annotations

import time

from slime_async.telemetry.occupancy import Occupancy
from slime_async.telemetry.spans import SpanRecorder


class ActorSpans:
    """One actor's, all of them but ``generate``, which its engine measures."""

    def __init__(self, recorder: SpanRecorder) -> None:
        self.recorder = recorder
        self.episodes = Occupancy(recorder, "episode")
        self.deliveries = Occupancy(recorder, "deliver")
        self.occupied = Occupancy(recorder, None, idle="idle")
        """From a reservation's begin to its delivery; none of them at all is idleness"""
        self._paused_ns: int | None = None
        self._has_weights = False

    def pause(self) -> None:
        """Of an attempt to publish that is tried again, the first counts."""
        self._paused_ns = self._paused_ns or time.monotonic_ns()

    def received_weights(self) -> None:
        """The first ones end the start."""
        if not self._has_weights:
            self._has_weights = True
            self.recorder.started()

    def resume(self) -> None:
        if self._paused_ns is not None:
            self.recorder.add("weight_sync", self._paused_ns, time.monotonic_ns())
            self._paused_ns = None

    def close(self) -> None:
        """Write what is still open."""
        for occupancy in (self.episodes, self.deliveries, self.occupied):
            occupancy.close()
