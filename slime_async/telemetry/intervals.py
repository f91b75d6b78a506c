"""Sets of time as sorted, disjoint, half-open intervals ``[start, end)`` of integers."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted, disjoint and maximal; empty intervals vanish. Raises ``ValueError`` for an end before its start."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end < start:
            raise ValueError(f"interval [{start}, {end}) ends before it starts")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return merged


def intersection(left: Iterable[Interval], right: Iterable[Interval]) -> list[Interval]:
    """What is in both, sorted and disjoint; the sides may overlap themselves."""
    a, b = union(left), union(right)
    common: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def total(intervals: Iterable[Interval]) -> int:
    """How long, every instant counted once."""
    return sum(end - start for start, end in union(intervals))


def difference(left: Iterable[Interval], right: Iterable[Interval]) -> list[Interval]:
    """What is in ``left`` and not in ``right``, sorted and disjoint; the sides may overlap themselves."""
    holes = union(right)
    rest: list[Interval] = []
    first = 0
    for start, end in union(left):
        while first < len(holes) and holes[first][1] <= start:
            first += 1
        at, hole = start, first
        while hole < len(holes) and holes[hole][0] < end:
            if at < holes[hole][0]:
                rest.append((at, holes[hole][0]))
            at = holes[hole][1]
            hole += 1
        if at < end:
            rest.append((at, end))
    return rest
