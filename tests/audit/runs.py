"""A small, honest run: three batches of two groups of two, a group dropped, a group still queued."""

from __future__ import annotations

from typing import Any

from slime_async.queue import Event, TrajectoryMeta
from slime_async.queue.events import (
    Accepted,
    BatchShape,
    Committed,
    GroupDropped,
    GroupOpened,
    LearnerJoined,
    Leased,
    MadeDurable,
    SourcesDeclared,
    WeightsPublished,
)
from slime_async.trajectory import TaskRef, TrajectoryKey

TOKENS = 10


def reward(serial: int, sample: int) -> float:
    return serial + 0.25 * sample


def accepted(serial: int, sample: int) -> Accepted:
    key = TrajectoryKey(serial, sample)
    meta = TrajectoryMeta(key, 1, TOKENS + 3, TOKENS + serial, 100, ((0, TOKENS + serial),), reward(serial, sample))
    return Accepted(meta, 0)


def opened(serial: int) -> GroupOpened:
    return GroupOpened(TaskRef(serial, "sums", serial))


def group(serial: int) -> list[Event]:
    return [opened(serial), accepted(serial, 0), accepted(serial, 1)]


def batch(version: int, *serials: int, incarnation: int = 1) -> list[Event]:
    return [Leased(incarnation, version, serials), Committed(version), WeightsPublished(version + 1)]


def honest_run() -> list[Event]:
    """Batches (0, 1), (2, 4), (5, 6); group 3 dropped; group 7 half there."""
    groups = [event for serial in range(7) for event in group(serial)]
    return [
        BatchShape(2, 2),
        SourcesDeclared({"sums": 100}),
        LearnerJoined(1, 0),
        WeightsPublished(0),
        *groups,
        *batch(0, 0, 1),
        GroupDropped(3, "stale"),
        *batch(1, 2, 4),
        MadeDurable(1),
        *batch(2, 5, 6),
        opened(7),
        accepted(7, 1),
    ]


def metrics_line(step: int, *serials: int) -> dict[str, Any]:
    rewards = [reward(serial, sample) for serial in serials for sample in (0, 1)]
    return {
        "step": step,
        "sampled_tokens": float(sum(2 * (TOKENS + serial) for serial in serials)),
        "reward_mean": sum(rewards) / len(rewards),
        "trajectories": float(len(rewards)),
    }


def honest_metrics() -> list[dict[str, Any]]:
    return [metrics_line(0, 0, 1), metrics_line(1, 2, 4), metrics_line(2, 5, 6)]
