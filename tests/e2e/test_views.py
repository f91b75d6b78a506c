"""What a real run lets people see: its accounts add up, and report and timeline say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_async.telemetry.accounting import UNACCOUNTED, accounts
from slime_async.telemetry.metrics import read_metrics
from slime_async.telemetry.spans import read_tracks
from tests.e2e.runs import started

SETTINGS = {"run.steps": "6", "actor.count": "2"}


def test_every_second_of_a_run_is_accounted_for_and_shown(tmp_path: Path) -> None:
    with started(tmp_path, SETTINGS) as run:
        code, output = run.finish()
        assert code == 0, output
        tracks = read_tracks(run.path / "spans")
        assert [(track.process, track.role) for track in tracks] == [
            ("actor-0", "actor"),
            ("actor-1", "actor"),
            ("hub", "hub"),
            ("learner", "learner"),
        ]
        sides = accounts(tracks)
        for role in ("actor", "learner"):
            assert sides[role].fractions.get(UNACCOUNTED, 0.0) < 0.01, (role, sides[role])
            assert sides[role].fractions["starting"] > 0
        clocks = {t.process: t.clock for t in tracks if t.clock is not None}
        assert clocks.keys() == {"actor-0", "actor-1", "learner"}
        assert all(abs(c.offset_ns) < c.error_ns + 10**8 for c in clocks.values()), "one machine"
        leases_s = sum(end - start for t in tracks for start, end in t.named("lease")) / 1e9
        steps = list(read_metrics(run.path / "metrics.jsonl"))
        assert leases_s == pytest.approx(sum(step["lease_wait_s"] for step in steps), rel=0.01, abs=0.01)
        assert sum(value for step in steps for name, value in step.items() if name.startswith("staleness/")) == sum(
            step["sampled_tokens"] for step in steps
        )
        report = (run.path / "report.html").read_text()
        assert "Queue depth</figcaption>" in report
        assert "Not readable" not in report
        timeline = json.loads((run.path / "timeline.json").read_text())
        names = {event["name"] for event in timeline["traceEvents"]}
        assert {"generate", "train", "forward", "pause", "broadcast", "resume", "evaluate", "weight_sync"} <= names
