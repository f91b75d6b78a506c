"""How long a run took from a kill to full throughput, from its events and metrics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from slime_async.telemetry.jsonl import read_jsonl

FULL_PACE = 1.5
"""A step that takes at most this many times the run's median step counts as undisturbed"""
STEADY_STEPS = 2
"""So many of them in a row are full throughput"""


@dataclass(frozen=True, slots=True)
class Death:
    """One process that was killed, and when steps came at the usual pace again (None: not before the end)."""

    role: str
    process: str
    recovered_s: float | None


def deaths_of(run: Path) -> list[Death]:
    """In order. Steps that are trained again count as throughput: the learner computes at its full rate."""
    events = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "role_died"]
    times = [line["time_s"] for line in read_jsonl(run / "metrics.jsonl") if line.get("phase") == "rl"]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    limit = FULL_PACE * statistics.median(gaps) if gaps else 0.0
    return [
        Death(event["role"], event["process"], _recovered_s(event["time_s"], times, gaps, limit)) for event in events
    ]


def _recovered_s(killed_s: float, times: Sequence[float], gaps: Sequence[float], limit: float) -> float | None:
    """Until the end of the first ``STEADY_STEPS`` undisturbed steps that began after the kill."""
    steady = 0
    for begun, ended, gap in zip(times, times[1:], gaps, strict=False):
        steady = steady + 1 if begun >= killed_s and gap <= limit else 0
        if steady == STEADY_STEPS:
            return ended - killed_s
    return None
