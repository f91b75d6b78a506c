"""How many rows a step of an engine computes that keeps requests where they are: the rule that the embedded engine and
the simulator share.

A request that ends leaves its row idle, and the step computes it all the same, up to the last row that is used. From
``most_rows`` on, moving the last request's keys and values to the front is cheaper than that.
"""

from __future__ import annotations

GAP_RATIO = 1.5
"""Rows per running request"""
MIN_ROWS = 8
"""Idle rows not worth a move: so small a batch costs the same with them"""


def most_rows(running: int) -> int:
    """The last row that is used is at most this one, counted from 1."""
    return int(GAP_RATIO * running) + MIN_ROWS
