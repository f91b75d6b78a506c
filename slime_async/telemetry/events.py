"""What happened in a run, beside its steps: one JSON line each in ``RUN/events.jsonl``, from every process.

================  =========  ======================================================================="""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from slime_async.protocol import Scalar
from slime_async.telemetry.jsonl import JsonLines

EventName = Literal[
    "run_started",
    "phase",
    "evaluation",
    "checkpoint",
    "role_died",
    "role_restarted",
    "role_added",
    "role_leaving",
    "role_left",
    "step_warning",
    "run_finished",
    "warning",
]


class EventLog:
    """Appends events; several processes may have the same file open."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, event: EventName, **fields: Scalar) -> None:
        self._lines.write({"event": event, "time_s": time.time(), **fields})

    def close(self) -> None:
        self._lines.close()
