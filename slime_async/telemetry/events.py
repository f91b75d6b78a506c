"""What happened in a run, beside its steps: one JSON line each in ``RUN/events.jsonl``, from every process.

=================  =========  =============================================================================
event              from       fields
=================  =========  =============================================================================
run_started        launcher   staleness_bound
phase              learner    name: warm_start, evaluation_before, control, rl, evaluation_after; done
evaluation         learner    name: before, after or supervised_only; source; accuracy; tasks; failed; version
checkpoint         learner    version; seconds: of writing
actor_died         launcher   actor, exit_code
actor_restarted    launcher   actor, restarts
learner_died       launcher   learner, exit_code
learner_restarted  launcher   learner, restarts
run_finished       launcher   outcome: finished, failed or interrupted; reason
=================  =========  =============================================================================
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
    "actor_died",
    "actor_restarted",
    "learner_died",
    "learner_restarted",
    "run_finished",
]


class EventLog:
    """Appends events; several processes may have the same file open."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, event: EventName, **fields: Scalar) -> None:
        self._lines.write({"event": event, "time_s": time.time(), **fields})

    def close(self) -> None:
        self._lines.close()
