"""Measured windows of a run, cut at the ends of its steps, so that no window counts a part of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Window:
    """From the end of one step to the end of a later one."""

    start_s: float
    """Unix time"""
    end_s: float
    steps: int
    samples: int
    """Trajectories trained"""
    sampled_tokens: int
    """Of them, masked ones included"""
    batch_tokens: int
    """With prompts and what environments inserted: what the learner computes"""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds

    @property
    def sampled_tokens_per_s(self) -> float:
        return self.sampled_tokens / self.seconds

    @property
    def batch_tokens_per_s(self) -> float:
        return self.batch_tokens / self.seconds


def cut(
    steps: Sequence[dict[str, Any]], begin_s: float, warmup_s: float, windows: int, window_s: float, batch: int
) -> list[Window]:
    """Windows of about ``window_s``, the first from the first step's end after ``begin_s + warmup_s`` on.

    ``steps`` are lines of ``metrics.jsonl``; ``batch`` counts trajectories. Each edge is the first end of a step at or
    after its nominal time; where steps are longer than a window, windows become fewer. Raises ``ValueError`` when
    fewer than two are left.
    """
    ends = [float(step["time_s"]) for step in steps]
    edges: list[int] = []
    for k in range(windows + 1):
        due = begin_s + warmup_s + k * window_s
        found = next((i for i, end in enumerate(ends) if end >= due), None)
        if found is not None and found not in edges:
            edges.append(found)
    if len(edges) < 3:
        raise ValueError(
            f"{len(ends)} steps give fewer than two windows of {window_s:g} s after {warmup_s:g} s of warm-up: "
            "raise bench.window-s, or make batches smaller"
        )
    return [_window(steps[first + 1 : last + 1], ends[first], batch) for first, last in pairwise(edges)]


def _window(steps: Sequence[dict[str, Any]], start_s: float, batch: int) -> Window:
    return Window(
        start_s=start_s,
        end_s=float(steps[-1]["time_s"]),
        steps=len(steps),
        samples=batch * len(steps),
        sampled_tokens=int(sum(step["sampled_tokens"] for step in steps)),
        batch_tokens=int(sum(step["batch_tokens"] for step in steps)),
    )
