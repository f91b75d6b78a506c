"""What the hub writes down of itself: when and why admission was closed, and how full the queue was.

``RUN/spans/hub.jsonl`` gets a ``gate`` span for every stretch in which nothing was granted, ``RUN/queue.jsonl`` a
sample of ``slime_async.queue.QueueStatistics`` and of what actors say of their requests with each heartbeat.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, Self

from slime_async.protocol import Report
from slime_async.queue.gate import GateCause
from slime_async.telemetry.jsonl import JsonLines
from slime_async.telemetry.spans import PIECE_NS, SpanRecorder

SAMPLED = {
    "published_version": "The last version that engines hold",
    "trained_version": "Batches trained",
    "reserved": "Trajectories granted, generation not begun",
    "running": "Trajectories being generated",
    "queued": "Trajectories accepted, in open and complete groups",
    "leased": "Trajectories with the learner",
    "trained": "Trajectories trained, not yet in a durable checkpoint",
    "complete_groups": "Groups that wait for a batch",
    "pacing": "Trajectories between grant and publication",
    "pacing_limit": "(η + 1) · B: where `pacing` closes admission",
    "held": "Trajectories that count against the queue's bound: open groups in full, complete and leased ones",
    "held_limit": "`batch.queue_trajectories`",
    "held_bytes": "Bytes queued and leased",
    "held_bytes_limit": "`batch.queue_bytes`",
    "busy_actors": "Actors with anything granted",
    "running_requests": "Requests that engines sample for, of all actors, as each told last",
    "waiting_requests": "The same of requests that wait for room in an engine, or for the end of a pause",
    "failures": "Episodes that failed, since the hub's start",
    "dropped": "Trajectories accepted and dropped with their groups",
    "masked_tokens": "Sampled tokens masked as stale, since the hub's start",
    "staleness_in_generation": "Of the last batch: versions published while its tokens were generated, token-weighted",
    "staleness_in_queue": "The same, between delivery and training",
    "length_generated_mean": "Sampled tokens per trajectory, over the last 4,096 delivered",
    "length_trained_mean": "The same, over the last 4,096 leased with any token unmasked",
    "length_distance": "Kolmogorov–Smirnov distance of these two: far above 0.1, the bound discards by length",
}
"""Which of the statistics go to ``queue.jsonl``, some 500 bytes, and what they are"""


class HubObserver:
    """Owned by the hub; ``close`` writes what is still open."""

    def __init__(self, recorder: SpanRecorder, samples: JsonLines) -> None:
        self._recorder = recorder
        self._samples = samples
        self._cause: GateCause | Literal["drain"] | None = None
        self._since_ns = time.monotonic_ns()

    @classmethod
    def of_run(cls, run_directory: Path) -> Self:
        recorder = SpanRecorder(run_directory / "spans" / "hub.jsonl", "hub", "hub")
        return cls(recorder, JsonLines(run_directory / "queue.jsonl"))

    @classmethod
    def silent(cls) -> Self:
        """For a hub without a run directory."""
        return cls(SpanRecorder(None, "hub"), JsonLines(None))

    @property
    def now_ns(self) -> int:
        """The run's time: all others align their clocks with it."""
        return self._recorder.now_ns()

    def listening(self) -> None:
        self._recorder.started()

    def gate(self, cause: GateCause | Literal["drain"] | None) -> None:
        """What keeps free slots from being granted anything now."""
        if cause != self._cause or (cause and time.monotonic_ns() - self._since_ns > PIECE_NS):
            self._write_gate()
            self._cause = cause

    def sample(self, statistics: Report) -> None:
        self._samples.write({"time_s": self.now_ns / 1e9, **{name: statistics[name] for name in SAMPLED}})

    def close(self) -> None:
        self._write_gate()
        self._recorder.close()
        self._samples.close()

    def _write_gate(self) -> None:
        now_ns = time.monotonic_ns()
        if self._cause is not None:
            self._recorder.add("gate", self._since_ns, now_ns, cause=self._cause)
        self._since_ns = now_ns
