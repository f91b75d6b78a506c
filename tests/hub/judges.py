"""A task whose groups are judged in a process, once a file says so."""

from __future__ import annotations

import time
from pathlib import Path

from slime_async.actors.judging import Group

SIZE = 100
REFUSED = 0.5
"""A first reward below it refuses the group"""
DEADLINE_S = 30.0


def source(gate: str) -> list[str]:
    return [gate] * SIZE


def group_reward(group: Group) -> list[float]:
    """Its samples' rewards and ten; not before the file of the task exists."""
    deadline = time.monotonic() + DEADLINE_S
    while not Path(group.content).exists():
        assert time.monotonic() < deadline, "nobody opened the gate"
        time.sleep(0.01)  # the function under test is one that takes its time
    return [10.0 + sample.reward for sample in group.samples]


def keep(group: Group) -> bool:
    return group.samples[0].reward - 10.0 >= REFUSED
