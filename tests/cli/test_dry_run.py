"""A dry run is the same run in small: what it keeps, what it replaces, and that it goes through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slime_async.actors.check import check_task
from slime_async.cli.dry_run import shrink
from slime_async.config import load_config
from slime_async.telemetry.metrics import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "qwen3_gsm8k.toml"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of the example are relative to it."""
    monkeypatch.chdir(ROOT)


def test_a_dry_run_keeps_what_is_to_be_checked_and_takes_the_sample(tmp_path: Path) -> None:
    config = load_config(EXAMPLE)
    small = shrink(config, tmp_path)
    assert small.run.steps == 2
    assert (small.task.reward, small.algorithm.preset) == (config.task.reward, config.algorithm.preset)
    assert small.staleness == config.staleness
    source = small.task.train["gsm8k"].arguments
    assert source["path"] == "examples/data/stories.jsonl"
    assert source["template"] == config.task.train["gsm8k"].arguments["template"]
    assert (small.actor.device, small.actor.engine, small.model.dtype) == ("cpu", "embedded", "float32")
    assert json.loads((Path(small.model.path) / "config.json").read_text())["model_type"] == "qwen3"


def test_a_checkpoint_that_is_here_gives_its_architecture_and_tokenizer(tmp_path: Path) -> None:
    from slime_async.demo.chat import make_checkpoint

    make_checkpoint(tmp_path / "real", 0)
    table = json.loads((tmp_path / "real" / "config.json").read_text())
    large = table | {"hidden_size": 4096, "num_hidden_layers": 36, "layer_types": ["full_attention"] * 36}
    (tmp_path / "real" / "config.json").write_text(json.dumps(large))
    config = load_config(EXAMPLE, {("model", "path"): str(tmp_path / "real")})
    tiny = Path(shrink(config, tmp_path / "run").model.path)
    made = json.loads((tiny / "config.json").read_text())
    assert (made["model_type"], made["vocab_size"]) == ("qwen3", table["vocab_size"])
    assert (made["hidden_size"], made["num_hidden_layers"]) == (64, 2)
    assert (tiny / "tokenizer_config.json").exists()


def test_the_examples_task_keeps_its_contract_on_the_sample(tmp_path: Path) -> None:
    small = shrink(load_config(EXAMPLE), tmp_path)
    report = check_task(small, Path(small.model.path), answers=["\\boxed{1}"])
    report.raise_for_errors()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_dry_run_trains_two_steps_and_evaluates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slime_async.cli.main", "train", str(EXAMPLE), "--dry-run"]
    command += ["--run.directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the dry run went through" in done.stdout
    (run,) = tmp_path.iterdir()
    steps = list(read_metrics(run / "metrics.jsonl"))
    assert [step["step"] for step in steps] == [0, 1]
    assert all(step["tokens_computed"] > 0 and step["tokens_trained"] > 0 for step in steps)
