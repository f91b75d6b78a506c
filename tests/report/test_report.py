"""The report of whole, running, damaged and compared runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slime_async.cli.main import main
from slime_async.report.charts import Chart, Series, draw
from slime_async.report.findings import findings
from slime_async.report.page import render
from slime_async.report.run import read_run, read_runs
from slime_async.report.scale import Axis, axis_for, label, thin
from tests.report.runs import CONFIG, write_run

FIGURES = (
    "Reward over steps",
    "Reward over time",
    "Accuracy over steps",
    "Accuracy over time",
    "Staleness",
    "Staleness over steps",
    "Learner over time",
    "Actors over time",
    "π_prox/μ",
    "Effective sample size of π_prox/μ",
    "Queue depth",
    "Weight sync",
    "Lengths trained against generated",
)


def test_a_report_shows_what_a_run_is_judged_by(tmp_path: Path) -> None:
    html = render([read_run(write_run(tmp_path / "run"))])
    for name in FIGURES:
        figure = re.search(rf"<figure><figcaption>{re.escape(name)}</figcaption>.*?</figure>", html)
        assert figure, f"no figure {name}"
        assert "nothing recorded" not in figure[0], name
    assert "25.0% → 75.0%" in html
    assert "Admission: staleness bound" in html
    assert "name = &quot;made-up&quot;" in html
    assert "2.13.0" in html


def test_a_report_needs_no_network(tmp_path: Path) -> None:
    html = render([read_run(write_run(tmp_path / "run"))])
    assert not re.findall(r"<link|<img|<iframe|src=|@import|url\(|https?://", html)
    assert all(target.startswith("#") for target in re.findall(r"href=[\"']([^\"']*)", html))


def test_text_from_a_run_is_never_markup(tmp_path: Path) -> None:
    html = render([read_run(write_run(tmp_path / "<b>run", config=CONFIG + '\n[task]\nreward = "</pre><b>"\n'))])
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>run" not in html
    assert "</pre><b>" not in html


def test_a_run_in_progress_has_a_report_from_its_first_moment_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(CONFIG)
    html = render([read_run(run)])
    assert "running" in html
    assert "nothing recorded" in html
    write_run(tmp_path / "later", steps=1)
    (tmp_path / "later" / "events.jsonl").unlink()
    assert "Reward over steps" in render([read_run(tmp_path / "later")])


@pytest.mark.parametrize("name", ["metrics.jsonl", "queue.jsonl", "events.jsonl", "spans/learner.jsonl"])
def test_a_torn_last_line_costs_that_line_alone(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    with (run / name).open("ab") as file:
        file.write(b'{"step": 9, "phase": "rl", "rew')
    read = read_run(run)
    assert read.problems == []
    assert read.summary.steps == 6
    assert "Reward over steps" in render([read])


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "queue.jsonl", "events.jsonl", "config.toml", "environment.json", "spans"]
)
def test_a_report_goes_without_any_of_its_files(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run")
    (run / name).rename(tmp_path / "gone")
    assert "<h2" in render([read_run(run)])


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 0, "pha' + text)
    (run / "environment.json").write_text("{")
    read = read_run(run)
    assert len(read.steps) == 5, "the torn line took the one after it along"
    assert [("metrics.jsonl, line 1" in p or "environment.json" in p) for p in read.problems] == [True, True]
    assert "Not readable" in render([read])


def test_runs_are_compared_with_a_line_each_and_what_differs_in_their_configurations(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run")
    second = write_run(tmp_path / "b" / "run", config=CONFIG.replace("groups = 4", "groups = 2"))
    runs = read_runs([first, second])
    assert [run.label for run in runs] == [str(first), str(second)], "directories of one name"
    html = render(runs)
    assert "2 runs compared" in html
    different = html.split("Configuration</h2>")[1].split("<details>")[0]
    assert "batch.groups" in different
    assert "batch.group_size" not in different


def test_the_command_writes_the_file_and_refuses_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").exists()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_findings_name_the_threshold_and_the_remedy(tmp_path: Path) -> None:
    [masked] = [text for text in findings(read_run(write_run(tmp_path / "run"))) if "masked" in text]
    assert masked == "17% of the sampled tokens were masked as stale: raise staleness.max_staleness."


def test_ticks_are_round_and_within_the_axis() -> None:
    assert axis_for([0.03, 0.97]).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert axis_for([3, 3], zero=True).ticks()[0] == 0
    assert axis_for([0.02, 30], log=True).ticks() == [0.01, 0.1, 1, 10, 100]
    assert axis_for([]) == Axis(0.0, 1.0)
    assert [label(value) for value in (0.35, 12_000, 3_200_000, 0.00001, 0)] == ["0.35", "12k", "3.2M", "1e-05", "0"]


def test_long_series_are_thinned_and_keep_their_extremes() -> None:
    points = [(float(i), 100.0 if i == 777 else float("nan") if i == 5 else 0.0) for i in range(10_000)]
    buckets = thin(points, limit=100)
    assert len(buckets) <= 100
    assert max(bucket.high for bucket in buckets) == 100.0
    assert "band" in draw(Chart("x", "step", [Series("", points)]))
