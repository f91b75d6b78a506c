"""``train --resume RUN``: what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_async.cli.main import main
from slime_async.cli.run_directory import owned
from slime_async.config import Config, ConfigError, dump_toml
from slime_async.learner.checkpoint.directory import CheckpointDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two steps that began with a model which is still there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    sections = {
        "run": {"steps": 2},
        "model": {"path": str(tmp_path / "model")},
        "task": {"train": {"sort": {"factory": "slime_async.demo.sorting:train"}}},
        "evaluation": {"before": False, "after": False},
    }
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.toml").write_text(dump_toml(Config.model_validate(sections)))
    return path


def complete(run: Path, version: int) -> None:
    directory = CheckpointDirectory(run / "checkpoints")
    directory.begin(version)
    directory.complete(version, keep=1)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    return capsys.readouterr().err


def test_a_configuration_and_a_run_to_resume_exclude_each_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leave other.toml out" in refusal(capsys, "other.toml", "--resume", str(run))
    assert "leave --control out" in refusal(capsys, "--control", "--resume", str(run))
    assert "give a configuration (examples/demo.toml is one), or --resume RUN" in refusal(capsys)


def test_a_run_without_a_checkpoint_cannot_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no " in refusal(capsys, "--resume", str(run.parent))
    said = refusal(capsys, "--resume", str(run))
    assert "no checkpoint yet (checkpoint.interval_steps = 0)" in said
    assert f"begin anew with slime-async train {run / 'config.toml'}" in said


def test_a_finished_run_goes_on_only_with_more_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete(run, 2)
    (run / "summary.json").write_text(json.dumps({"outcome": "finished"}))
    assert "all of run.steps = 2 are trained; --run.steps 4 would go on" in refusal(capsys, "--resume", str(run))
    assert "all of run.steps = 1 are trained" in refusal(capsys, "--resume", str(run), "--run.steps", "1")


def test_a_model_that_was_moved_is_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete(run, 1)
    (run.parent / "model" / "config.json").unlink()
    assert "say with --model.path where" in refusal(capsys, "--resume", str(run))


def test_every_flag_that_would_make_another_run_of_it_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete(run, 1)
    flags = ["--batch.groups", "5", "--algorithm.clip-low", "0.1", "--run.steps", "9"]
    said = refusal(capsys, "--resume", str(run), *flags).splitlines()
    assert [line.split(" = ")[0] for line in said] == [
        "slime-async: algorithm.clip_low",
        "slime-async: batch.groups",
    ]


def test_a_run_directory_has_one_launcher_at_a_time(run: Path) -> None:
    with owned(run), pytest.raises(ConfigError, match="another launcher runs in"), owned(run):
        pass
    with owned(run):
        pass
