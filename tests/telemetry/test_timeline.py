"""The timeline, as Perfetto's own trace processor reads it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slime_async.telemetry.accounting import COMPUTING, accounts, rl_accounts
from slime_async.telemetry.metrics import read_metrics
from slime_async.telemetry.spans import read_tracks
from slime_async.telemetry.timeline import write_timeline
from tests.report.runs import write_run
from tests.telemetry.trace_processor import TraceProcessor

SLICES = """
select process.name as process, thread.name as lane, slice.name as name, slice.ts as ts, slice.dur as dur
from slice join thread_track on slice.track_id = thread_track.id join thread using (utid) join process using (upid)
"""
RL_FRACTIONS = f"""
with named as ({SLICES}),
     rl as (select ts as begin, ts + dur as end from named where process = 'run' and name = 'rl'),
     cut as (
       select process, name, min(ts + dur, rl.end) - max(ts, rl.begin) as inside
       from named, rl where lane = 'activity' and ts < rl.end and ts + dur > rl.begin
     ),
     side as (
       select iif(process like 'learner%', 'learner', 'actor') as role, name, sum(inside) as ns from cut group by 1, 2
     )
select role, name, ns * 1.0 / sum(ns) over (partition by role) as fraction from side
"""
"""The idle accounting, in SQL"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("timeline") / "run")


@pytest.fixture(scope="module")
def trace(run: Path) -> TraceProcessor:
    return TraceProcessor(write_timeline(run).read_bytes())


def test_perfetto_reads_everything_without_complaint(trace: TraceProcessor) -> None:
    complaints = trace.query("select name, value from stats where value > 0 and severity in ('error', 'data_loss')")
    assert [(row.name, row.value) for row in complaints] == []
    [spans] = trace.query(f"select count(*) as number from ({SLICES}) where lane != 'activity' and process != 'run'")
    assert spans.number == 1 + 6 * 7 + 3 + 1


def test_idle_fractions_recomputed_from_the_trace_equal_the_accounting(run: Path, trace: TraceProcessor) -> None:
    from_trace = {(row.role, row.name): row.fraction for row in trace.query(RL_FRACTIONS)}
    from_spans = {
        (role, part): share
        for role, side in rl_accounts(read_tracks(run / "spans")).items()
        for part, share in side.fractions.items()
    }
    assert from_trace == pytest.approx(from_spans, abs=0.01)
    rl_s = 5.9  # of six steps, from the first lease to the last commit
    assert from_trace["actor", COMPUTING] == pytest.approx(4.5 / rl_s, abs=0.01)
    assert from_trace["actor", "admission_staleness"] == pytest.approx((0.75 - 0.1) / rl_s, abs=0.01)


def test_the_learners_waiting_in_the_trace_equals_what_its_metrics_say(run: Path, trace: TraceProcessor) -> None:
    steps = list(read_metrics(run / "metrics.jsonl"))
    wall_s = sum(step["step_s"] for step in steps)
    waited = {row.name: row.fraction for row in trace.query(RL_FRACTIONS) if row.role == "learner"}
    assert waited["queue_empty"] == pytest.approx(sum(step["lease_wait_s"] for step in steps) / wall_s, abs=0.01)
    assert waited["commit"] == pytest.approx(sum(step["commit_s"] for step in steps) / wall_s, abs=0.01)


def test_clocks_of_all_processes_are_aligned(trace: TraceProcessor) -> None:
    """The made-up actor's clock is two seconds slow; it really began to generate with the learner's first lease."""
    rows = {row.name: row.ts for row in trace.query(f"select name, min(ts) as ts from ({SLICES}) group by name")}
    assert abs(rows["generate"] - rows["lease"]) < 10**7


def test_activity_is_disjoint_and_without_holes(trace: TraceProcessor) -> None:
    for process in ("learner", "actor-0"):
        rows = trace.query(
            f"select ts, dur from ({SLICES}) where lane = 'activity' and process = '{process}' order by ts"
        )
        assert all(abs(a.ts + a.dur - b.ts) <= 1 for a, b in itertools.pairwise(rows)), process


def test_a_publication_holds_its_phases(trace: TraceProcessor) -> None:
    [row] = trace.query(
        "select count(*) as number from slice as inner_ join slice as outer_ on inner_.parent_id = outer_.id "
        "where inner_.name = 'broadcast' and outer_.name = 'publish'"
    )
    assert row.number == 6


def test_a_run_that_left_nothing_has_an_empty_timeline(tmp_path: Path) -> None:
    assert json.loads(write_timeline(tmp_path).read_text())["traceEvents"] == []


def test_what_the_trace_says_of_a_whole_life_adds_up(run: Path) -> None:
    """Read by plain Python, without Perfetto: seconds by process and part."""
    sums: dict[str, float] = {}
    for event in _activity(json.loads(write_timeline(run).read_text())["traceEvents"]):
        sums[event["name"]] = sums.get(event["name"], 0.0) + event["dur"] / 1e6
    sides = accounts(read_tracks(run / "spans"))
    assert sum(sums.values()) == pytest.approx(sum(side.wall_s for side in sides.values()), rel=0.001)


def _activity(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    lanes = {e["tid"] for e in events if e["name"] == "thread_name" and e["args"]["name"] == "activity"}
    return (event for event in events if event["ph"] == "X" and event["tid"] in lanes)
