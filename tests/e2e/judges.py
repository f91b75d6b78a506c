"""Rewards and a filter of whole groups whose results are known beforehand."""

from __future__ import annotations

from slime_async.actors.judging import Group

MEAN = 0.5


def ranked(group: Group) -> list[float]:
    """From 0 for the first sample to 1 for the last, whatever they say."""
    last = len(group.samples) - 1
    return [sample / last for sample in range(len(group.samples))]


def ascending(group: Group) -> bool:
    """Half of the tasks."""
    return str(group.content["prompt"]).startswith("+")
