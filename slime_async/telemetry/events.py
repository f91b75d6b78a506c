"""What happened in a run, beside its steps: one JSON line each in ``RUN/events.jsonl``, from every process.

================  =========  ==============================================================================
event             from       fields
================  =========  ==============================================================================
run_started       launcher   staleness_bound
phase             learner    name: warm_start, evaluation_before, control, rl, evaluation_after; done
evaluation        learner    name: before, after, version_N (on schedule) or supervised_only; source; accuracy, with
                             accuracy_low and accuracy_high (95%); reward_mean; pass@k; tasks; samples (per task);
                             failed; version_first and version (the last) that answered; pinned: only one did; seconds
checkpoint        learner    version, seconds: one became durable
role_died         launcher   role: hub, learner or actor; process, as its log is named; exit_code
role_restarted    launcher   role; process; restarts: of this role so far
role_added        launcher   role, process: an actor that was asked for while the run went on
role_leaving      launcher   role, process: an actor that was asked to go
role_left         launcher   role, process, exit_code: it has gone
step_warning      learner    step, name, metric, value, threshold, message: see slime_async.correction.warnings
run_finished      launcher   outcome: finished, failed or interrupted; reason
warning           all        process, level, text; repeated: so many of its kind were held back before
================  =========  ==============================================================================
"""

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
