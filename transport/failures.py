"""What came to nothing, by reason, and when to give up: a run in which nothing succeeds any more ends with the reason.

Single failures are normal and cost an attempt each. But a reward that always raises would have actors play for ever
while the learner waits, and nothing but a log would say why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

MAX_IN_A_ROW = 64
"""Episodes that fail without one that succeeds in between; more than an engine's death fails at once in small runs"""
FAILING_FOR_S = 30.0
"""And so long at least: an engine that is started again needs a while"""
MAX_GROUPS_IN_A_ROW = 8
"""That could not be judged"""


class Failures:
    """Of one hub, since it was started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._in_a_row = 0
        self._since = 0.0
        self._groups_in_a_row = 0
        self._last = ""

    def episode_failed(self, kind: str, reason: str, *, counts: bool) -> None:
        """``counts``: it was one of training's."""
        self._counts[kind or "unknown"] += counts
        if not self._in_a_row:
            self._since = self._clock()
        self._in_a_row += 1
        self._last = reason

    def episode_succeeded(self) -> None:
        self._in_a_row = 0

    def group_failed(self, episodes: int, reason: str) -> None:
        """Its judge failed, and all of its episodes are dropped."""
        self._counts["judge"] += episodes
        self._groups_in_a_row += 1
        self._last = reason

    def group_succeeded(self) -> None:
        self._groups_in_a_row = 0

    def take(self) -> dict[str, int]:
        """Episodes by reason since the last call."""
        counts = {kind: count for kind, count in sorted(self._counts.items()) if count}
        self._counts.clear()
        return counts

    @property
    def hopeless(self) -> str:
        """Why nothing will come of this run; empty while something may."""
        if self._groups_in_a_row >= MAX_GROUPS_IN_A_ROW:
            return f"{self._groups_in_a_row} groups in a row could not be judged, the last: {self._last}"
        failing_s = self._clock() - self._since
        if self._in_a_row >= MAX_IN_A_ROW and failing_s >= FAILING_FOR_S:
            return (
                f"{self._in_a_row} episodes in a row have failed within {failing_s:.0f} s and none has succeeded, the "
                f"last: {self._last} (logs/actor-*.log has the traceback; slime-async check-task tries a task alone)"
            )
        return ""
