"""A whole run killed and resumed, as its user does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slime_async.learner.checkpoint.directory import CheckpointDirectory
from slime_async.telemetry.metrics import read_metrics
from tests.e2e.runs import ROOT, TIMEOUT_S, Run, environment, started

pytestmark = pytest.mark.timeout(240)


def resume(run: Run, *flags: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "slime_async.cli.main", "train", "--resume", str(run.path), *flags]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())


def test_a_killed_run_goes_on_from_its_checkpoint_in_its_own_directory(tmp_path: Path) -> None:
    settings = {"run.steps": "1000", "checkpoint.interval-steps": "3", "evaluation.before": "false"}
    with started(tmp_path / "runs", {**settings, "evaluation.after": "false"}) as run:
        run.wait_for("its directory", lambda: run.path.is_dir())
        checkpoints = CheckpointDirectory(run.path / "checkpoints")
        run.wait_for("a checkpoint after the warm start's", lambda: (checkpoints.latest() or 0) >= 3)
        again = resume(run)
        assert again.returncode == 2
        assert f"another launcher runs in {run.path}" in again.stderr
        run.process.kill()
        run.wait_until_gone(10)
        latest = checkpoints.latest()
        assert latest is not None
        refused = resume(run, "--batch.group-size", "2", "--learner.learning-rate", "1e-5", "--actor.count", "2")
        assert refused.returncode == 2
        assert "batch.group_size = 2 cannot be set on resuming, the run has 4" in refused.stderr
        assert "learner.learning_rate = 1e-05 cannot be set on resuming, the run has 0.0002" in refused.stderr
        assert "actor.count" not in refused.stderr
        resumed = resume(run, "--run.steps", str(latest + 4))
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        lines = list(read_metrics(run.path / "metrics.jsonl"))
        assert [line["step"] for line in lines] == list(range(latest + 4))
        assert [line["incarnation"] for line in lines] == [1] * latest + [2] * 4
        assert checkpoints.latest() == latest + 4
        assert run.summary()["outcome"] == "finished"
        assert (run.path / "checkpoints" / "final" / "model.safetensors").exists()
        finished = resume(run)
        assert finished.returncode == 2
        assert f"all of run.steps = {latest + 4} are trained" in finished.stderr
