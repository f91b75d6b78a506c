"""Comparison of nested expected values with computed ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-15
"""For values that are zero but for rounding"""


class Rounded(NamedTuple):
    """A computed value whose expected counterpart was rounded: they agree within ``margin``."""

    value: float
    margin: float


def first_difference(expected: Any, actual: Any, where: str = "") -> str | None:
    """Names the first place where ``actual`` differs from ``expected``, or None; extra entries are ignored."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key not in actual:
                return f"{where}{key} is expected but not computed"
            if (problem := first_difference(value, actual[key], f"{where}{key}.")) is not None:
                return problem
        return None
    if isinstance(expected, list):
        if len(expected) != len(actual):
            return f"{where[:-1]} has {len(actual)} entries, expected {len(expected)}"
        for index, (value, computed) in enumerate(zip(expected, actual, strict=True)):
            if (problem := first_difference(value, computed, f"{where}{index}.")) is not None:
                return problem
        return None
    if isinstance(actual, Rounded):
        slack = actual.margin + ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * abs(actual.value)
        agrees = isinstance(expected, int | float) and abs(expected - actual.value) <= slack
        return None if agrees else f"{where[:-1]} is {actual.value!r} (± {actual.margin:.1e}), expected {expected!r}"
    if expected is None or actual is None:
        return None if expected is actual else f"{where[:-1]} is {actual}, expected {expected}"
    if math.isclose(expected, actual, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE):
        return None
    if math.isnan(expected) and math.isnan(actual):
        return None
    return f"{where[:-1]} is {actual!r}, expected {expected!r}"
