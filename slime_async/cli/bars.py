"""A long step of a command as a bar with an estimate; without a terminal, as a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from slime_async.telemetry.progress import Progress

LINE_INTERVAL_S = 10.0
"""Between the lines of a step that nobody watches in a terminal"""


@contextmanager
def progress(title: str, unit: str) -> Iterator[Progress]:
    """Show what the yielded function is told: (done, total)."""
    from slime_async.cli.live import has_terminal

    if not has_terminal():
        print(title, flush=True)
        yield LineProgress(title, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Bar(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class LineProgress:
    """Prints ``title: done/total unit, about N s left`` every so often."""

    def __init__(self, title: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._unit = unit
        self._clock = clock
        self._begun_s = self._told_s = clock()

    def __call__(self, done: int, total: int) -> None:
        now_s = self._clock()
        if now_s - self._told_s < LINE_INTERVAL_S or not 0 < done < total:
            return
        self._told_s = now_s
        left_s = (now_s - self._begun_s) / done * (total - done)
        print(f"{self._title}: {done}/{total} {self._unit}, about {left_s:.0f} s left", flush=True)
