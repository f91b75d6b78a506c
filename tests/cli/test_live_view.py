"""The live view at every size, and what it makes of a run's moments."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from slime_async.cli.bars import LineProgress
from slime_async.cli.live import kept_until_the_end
from slime_async.cli.live_state import LiveState, Pace
from slime_async.cli.live_view import bar, screen, sparkline
from slime_async.config import Config
from slime_async.protocol import PeerStatus, Report, RunStatus
from slime_async.telemetry.events import EventLog
from slime_async.telemetry.jsonl import FollowedLines
from slime_async.telemetry.spans import SpanRecorder

QUEUE: Report = {
    "held": 512,
    "held_limit": 768,
    "pacing": 700,
    "pacing_limit": 768,
    "running": 64,
    "reserved": 0,
    "busy_actors": 1,
    "published_version": 17,
}
LEARNER: Report = {
    "phase": "rl",
    "step": 17,
    "steps": 200,
    "activity": "lease",
    "reward_mean": 0.4123,
    "learner_tokens_per_s": 9300.0,
    "staleness_mean": 0.94,
    "staleness_max": 2,
    "staleness/0": 400,
    "staleness/1": 500,
    "staleness/3": 100,
    "mismatch/ess": 0.987,
    "mismatch/ratio_max": 4.2,
    "publish_s": 0.2,
    "pause_to_resume_s": 0.05,
}
ACTOR = PeerStatus("actor", "actor-0", 0.1, {"weight_version": 17, "running_requests": 64, "generated_tokens": 100})
SILENT = PeerStatus("actor", "actor-1", 8.0, {"weight_version": 16, "generated_tokens": 100})


def status(learner: Report, *actors: PeerStatus, queue: Report = QUEUE) -> RunStatus:
    return RunStatus("demo-1", queue, (PeerStatus("learner", "learner-1", 0.1, learner), *actors))


def state_in(directory: Path) -> LiveState:
    """After twelve steps of RL, with a warning and a minute of spans."""
    events = EventLog(directory / "events.jsonl")
    events.write("evaluation", name="before", source="held-out", accuracy=0.236, tasks=512, failed=0, version=0)
    events.write("warning", process="hub", level="warning", text="nothing moved\nfor 120 s", repeated=0)
    events.close()
    recorder = SpanRecorder(directory / "spans" / "learner.jsonl", "learner", "learner")
    now = time.monotonic_ns()
    recorder.add("lease", now - 10**10, now - 4 * 10**9)
    recorder.add("train", now - 4 * 10**9, now)
    recorder.close()
    state = LiveState(Config(), directory, begun_s=0.0)
    for step in range(12):
        report = {**LEARNER, "step": step, "reward_mean": step / 12}
        state.update(status(report, ACTOR, SILENT), 100.0 + 2 * step)
    return state


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> LiveState:
    return state_in(tmp_path_factory.mktemp("live"))


@settings(max_examples=60)
@given(st.integers(1, 220), st.integers(1, 70))
def test_a_screen_fits_its_window(state: LiveState, width: int, height: int) -> None:
    lines = screen(state, width, height)
    assert 1 <= len(lines) <= height
    assert all(cell_len(line.plain) <= width for line in lines)
    assert all("\n" not in line.plain for line in lines)


def shown(state: LiveState, width: int = 140, height: int = 50) -> str:
    return "\n".join(line.plain for line in screen(state, width, height))


def test_a_large_window_shows_everything_that_people_judge_a_run_by(state: LiveState) -> None:
    text = shown(state)
    for wanted in (
        "demo-1",
        "11/200",
        "6:18 left",  # 189 steps to come, at two seconds each
        "0.917",
        "23.6% before",
        "ESS 0.987",
        "9.3k tokens/s",
        "mean 0.94, largest 2, bound 2",
        "3 old",
        "512/768",
        "700/768",
        "learner waits for actors, for 22 s",
        "queue empty 60%, computing 40%",
        "v17  64 running",
        "heard 8 s ago",
        "hub: nothing moved for 120 s",
    ):
        assert wanted in text, f"{wanted!r} is not in\n{text}"


def test_a_small_window_keeps_what_matters_most(state: LiveState) -> None:
    text = shown(state, 60, 12)
    assert "11/200" in text
    assert "reward" in text
    assert "Warnings" not in text
    assert len(text.splitlines()) <= 12


def test_a_run_that_is_just_starting_has_a_screen_too(tmp_path: Path) -> None:
    state = LiveState(Config(), tmp_path, begun_s=0.0)
    assert "connecting" in shown(state)
    state.update(RunStatus("demo-1", {}, ()), 3.0)
    assert "starting" in shown(state)
    state.update(status({"phase": "warm_start", "step": 0, "steps": 500, "loss": 2.0}, queue={}), 4.0)
    state.update(status({"phase": "warm_start", "step": 100, "steps": 500, "loss": 0.7}, queue={}), 14.0)
    assert "100/500  40 s left" in shown(state)
    assert "0.7000" in shown(state)
    state.update(
        status({"phase": "evaluation_before"}, queue={"evaluation_missing": 12, "evaluation_reserved": 100}), 20
    )
    assert "400/512" in shown(state)


def test_an_estimate_needs_progress_and_begins_anew_with_each_phase() -> None:
    pace = Pace()
    pace.update("warm_start", 40, 100, 10.0)
    assert pace.left_s(10.0) is None
    pace.update("warm_start", 60, 100, 20.0)
    assert pace.left_s(20.0) == 20.0
    pace.update("rl", 0, 10, 21.0)
    assert pace.left_s(30.0) is None


def test_bars_and_curves_have_their_length() -> None:
    assert bar(0.5, 10, "green").plain == "█████░░░░░"
    assert bar(1.7, 4, "green").plain == "████"
    assert all(cell_len(bar(n / 100, 13, "green").plain) == 13 for n in range(101))
    assert sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert len(sparkline(list(range(100)), 30)) <= 30
    assert sparkline([], 10) == ""


def test_what_is_printed_under_the_view_comes_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with kept_until_the_end():
        sys.stdout.write("actor died\n")
        assert capsys.readouterr().out == ""
    assert capsys.readouterr().out == "actor died\n"


def test_followed_lines_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = FollowedLines(path)
    assert lines.new() == []
    path.write_bytes(b'{"a": 1}\n{"a": ')
    assert lines.new() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b'2}\nnonsense\n{"a": 3}\n')
    assert lines.new() == [{"a": 2}, {"a": 3}]
    assert lines.new() == []


def test_without_a_terminal_a_long_step_prints_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = LineProgress("evaluating", "tasks", clock=lambda: now[0])
    for done in range(0, 101, 10):
        now[0] = done * 0.25
        progress(done, 100)
    assert capsys.readouterr().out.splitlines() == [
        "evaluating: 40/100 tasks, about 15 s left",
        "evaluating: 80/100 tasks, about 5 s left",
    ]
