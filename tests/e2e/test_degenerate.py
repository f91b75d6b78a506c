"""The two limits of asynchrony, as whole runs: η = 0 is synchronous RL, η = 1 at batch boundaries is one-step-off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime_async.config import load_config
from tests.e2e.plain import generate_then_train
from tests.e2e.runs import started

pytestmark = pytest.mark.timeout(240)
BARE = {"warm_start.steps": "0", "evaluation.before": "false", "evaluation.after": "false"}


def test_without_staleness_a_run_gives_bitwise_what_a_plain_loop_of_generating_and_training_gives(
    tmp_path: Path,
) -> None:
    settings = {"run.steps": "3", "run.deterministic": "true", "staleness.max-staleness": "0", "actor.count": "2"}
    settings["actor.max-running-requests"] = "16"
    with started(tmp_path / "runs", {**BARE, **settings, "task.reward": "tests.e2e.plain:variety"}) as run:
        code, output = run.finish()
        assert code == 0, output
        trained = load_file(run.path / "checkpoints" / "final" / "model.safetensors")
        initial = load_file(run.path / "checkpoints" / "initial" / "model.safetensors")
        torch.set_num_threads(1)
        expected = generate_then_train(load_config(run.path / "config.toml"), tmp_path / "scratch")
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    assert not any(torch.equal(trained[name], initial[name]) for name in expected)


def test_one_version_of_staleness_at_batch_boundaries_is_one_step_off(tmp_path: Path) -> None:
    settings = {"run.steps": "6", "staleness.max-staleness": "1", "weights.publish": "batch_boundary"}
    with started(tmp_path / "runs", {**BARE, **settings}) as run:
        code, output = run.finish()
        assert code == 0, output
        ages = [(step["staleness_mean"], step["staleness_max"]) for step in run.steps()]
        assert ages == [(0, 0), *[(1, 1)] * 5]
        assert {step["tokens_masked_as_stale"] for step in run.steps()} == {0}
        assert run.summary()["trajectories_trained"] == 96
