"""Every process's warnings in one place: beside their logs they become events, for the live view and the report."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from slime_async.telemetry.events import EventLog

QUIET_S = 10.0
"""A warning of the same kind (logger and wording) within this time is counted, not written"""
TEXT_LIMIT = 2000
"""Characters of one warning that are kept"""


class WarningRecorder(logging.Handler):
    """Writes records from WARNING on as ``warning`` events of one process."""

    def __init__(self, events: EventLog, process: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._events = events
        self._process = process
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}
        self._held_back: dict[tuple[str, str], int] = {}
        self._writing = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        kind, now = (record.name, str(record.msg)), self._clock()
        with self._writing:
            if now - self._last.get(kind, -QUIET_S) < QUIET_S:
                self._held_back[kind] = self._held_back.get(kind, 0) + 1
                return
            self._last[kind] = now
            text = record.getMessage()[:TEXT_LIMIT]
            repeated = self._held_back.pop(kind, 0)
            level = record.levelname.lower()
            self._events.write("warning", process=self._process, level=level, text=text, repeated=repeated)

    def close(self) -> None:
        self._events.close()
        super().close()


def record_warnings(run_directory: Path, process: str) -> WarningRecorder:
    """From now on, all warnings of this process go to ``RUN/events.jsonl``, too."""
    handler = WarningRecorder(EventLog(run_directory / "events.jsonl"), process)
    logging.getLogger().addHandler(handler)
    return handler
