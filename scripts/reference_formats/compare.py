"""Comparison of nested expected values with computed ones."""

from __future__ import annotations

import math
from typing import Any

RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-15
"""For values that are zero but for rounding"""


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
    if expected is None or actual is None:
        return None if expected is actual else f"{where[:-1]} is {actual}, expected {expected}"
    if math.isclose(expected, actual, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE):
        return None
    if math.isnan(expected) and math.isnan(actual):
        return None
    return f"{where[:-1]} is {actual!r}, expected {expected!r}"
