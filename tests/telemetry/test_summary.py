"""Metrics and events on disk, and the summary computed from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_async.cli.result import summary_rows
from slime_async.telemetry.events import EventLog
from slime_async.telemetry.jsonl import JsonLines, read_jsonl
from slime_async.telemetry.metrics import FAMILIES, METRICS, MetricsWriter, read_metrics
from slime_async.telemetry.spans import SpanRecorder
from slime_async.telemetry.summary import summarise, write_summary

STEP = {"trajectories": 8, "tokens_trained": 100, "tokens_masked_as_stale": 5, "requests_in_flight_at_update": 0}


def write_run(run: Path) -> None:
    events = EventLog(run / "events.jsonl")
    events.write("run_started", staleness_bound=2)
    for name, source, accuracy, tasks in (
        ("before", "a", 0.2, 100),
        ("before", "b", 0.5, 50),
        ("after", "a", 0.1, 100),
        ("after", "a", 0.9, 100),
        ("supervised_only", "a", 0.3, 10),
    ):
        events.write("evaluation", name=name, source=source, accuracy=accuracy, tasks=tasks, failed=0, version=0)
    events.write("role_died", role="actor", process="actor-0", exit_code=-9)
    for name, step in (("mismatch_kl", 1), ("low_ess", 1), ("mismatch_kl", 51)):
        events.write("step_warning", step=step, name=name, metric="m", value=0.3, threshold=0.1, message="too much")
    metrics = MetricsWriter(run / "metrics.jsonl")
    metrics.write(0, {"loss": 9.0}, phase="warm_start")
    for step, (stale, mean, reward) in enumerate([(0, 0.0, 0.1), (1, 0.5, 0.2), (2, 1.5, 0.6)]):
        values = STEP | {"staleness_max": stale, "staleness_mean": mean, "reward_mean": reward}
        values |= {"mismatch/k3": 0.1 * step, "mismatch/k3/floor": 1e-6}
        metrics.write(step, values)
    metrics.write(2, STEP | {"staleness_max": 2, "tokens_trained": 300, "staleness_mean": 1.0, "reward_mean": 0.8,
                             "requests_in_flight_at_update": 17, "mismatch/k3": 0.05})  # fmt: skip
    events.write("run_finished", outcome="finished", reason="")
    recorder = SpanRecorder(run / "spans" / "learner.jsonl", "learner")
    for name, start, end in (("lease", 0, 10), ("train", 10, 30), ("commit", 30, 40), ("generate", 0, 20)):
        recorder.add(name, start, end)
    for file in (events, metrics, recorder):
        file.close()


def test_a_summary_follows_from_metrics_events_and_spans(tmp_path: Path) -> None:
    write_run(tmp_path)
    summary = write_summary(tmp_path)
    assert summary.outcome == "finished"
    assert summary.accuracy_before == pytest.approx((0.2 * 100 + 0.5 * 50) / 150)
    assert (summary.accuracy_after, summary.accuracy_supervised_only) == (0.9, 0.3)
    assert (summary.steps, summary.trajectories_trained) == (3, 24)
    assert (summary.staleness_max, summary.staleness_bound) == (2, 2)
    assert summary.staleness_mean == pytest.approx((0.5 * 100 + 1.0 * 300) / 500)
    assert (summary.tokens_masked_as_stale, summary.tokens_trained) == (15, 500)
    assert summary.overlap_fraction == 0.5
    assert (summary.updates_with_requests_in_flight, summary.requests_in_flight_max) == (1, 17)
    assert (summary.reward_first, summary.reward_last) == (0.1, 0.8)
    assert summary.actor_deaths == 1
    assert (summary.mismatch_kl, summary.mismatch_kl_max, summary.mismatch_kl_floor) == (0.05, 0.1, 1e-6)
    assert summary.warnings == ("mismatch_kl", "low_ess")
    assert ("mismatch KL, last steps (floor)", "0.05 (1e-06)") in summary_rows(summary)
    assert ("warnings", "mismatch_kl, low_ess") in summary_rows(summary)
    assert summary.wall_s is not None
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["accuracy_after"] == 0.9
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_left_nothing_has_a_summary_too(tmp_path: Path) -> None:
    summary = summarise(tmp_path)
    assert (summary.outcome, summary.steps, summary.accuracy_before, summary.overlap_fraction) == (
        "running",
        0,
        None,
        None,
    )


def test_a_metric_without_documentation_is_refused(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="reward_maen are not documented"):
        writer.write(0, {"reward_maen": 1.0})
    writer.write(0, {"mismatch/ess": 0.9, "environment/turns": 2})
    writer.close()
    assert [line["mismatch/ess"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.9]


def test_a_restarted_learner_takes_back_the_steps_from_its_checkpoint_on(tmp_path: Path) -> None:
    def write(incarnation: int, steps: range) -> None:
        writer = MetricsWriter(tmp_path / "metrics.jsonl", incarnation)
        for step in steps:
            writer.write(step, {"loss": incarnation})
        writer.close()

    def read() -> dict[int, float]:
        return {line["step"]: line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")}

    write(1, range(6))
    write(3, range(2, 4))  # its checkpoint was of version 2: steps 4 and 5 are no part of its history
    assert read() == {0: 1, 1: 1, 2: 3, 3: 3}
    write(1, range(6, 7))  # still alive, but replaced
    write(3, range(4, 5))
    assert read() == {0: 1, 1: 1, 2: 3, 3: 3, 4: 3}


def test_every_metric_says_what_it_is() -> None:
    assert all(metric.definition for metric in METRICS.values())
    assert all(name.endswith("/") for name in FAMILIES)


def test_a_line_cut_off_at_the_end_is_left_out_and_any_other_bad_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path)
    lines.write({"a": 1})
    lines.close()
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    assert list(read_jsonl(path)) == [{"a": 1}]
    path.write_bytes(b'{"a": \n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        list(read_jsonl(path))
