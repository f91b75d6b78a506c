"""Rewards and a filter of whole groups whose results are known beforehand."""

from __future__ import annotations

from slime_async.actors.judging import Group

MEAN = 0.375
"""Of groups of four"""


def ranked(group: Group) -> list[float]:
    """0 for the first sample, and a quarter more for each one after it, whatever they say."""
    return [sample / 4 for sample in range(len(group.samples))]


def ascending(group: Group) -> bool:
    """Half of the tasks."""
    return str(group.content["prompt"]).startswith("+")
