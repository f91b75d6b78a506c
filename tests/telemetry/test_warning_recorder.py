"""Warnings of every process as events."""

from __future__ import annotations

import logging
from pathlib import Path

from slime_async.telemetry.events import EventLog
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.warnings import QUIET_S, TEXT_LIMIT, WarningRecorder


def test_warnings_become_events_and_repeated_ones_are_counted(tmp_path: Path) -> None:
    now = [0.0]
    path = tmp_path / "events.jsonl"
    handler = WarningRecorder(EventLog(path), "actor-0", clock=lambda: now[0])
    log = logging.Logger("some.module")
    log.addHandler(handler)
    log.info("not this")
    for number in range(5):
        log.warning("episode %d failed", number)
    log.error("another kind: %s", "x" * 2 * TEXT_LIMIT)
    now[0] += QUIET_S
    log.warning("episode %d failed", 9)
    handler.close()
    events = list(read_jsonl(path))
    assert [(event["level"], event["repeated"]) for event in events] == [("warning", 0), ("error", 0), ("warning", 4)]
    assert [event["text"][:16] for event in events] == ["episode 0 failed", "another kind: xx", "episode 9 failed"]
    assert all(event["process"] == "actor-0" and len(event["text"]) <= TEXT_LIMIT for event in events)
