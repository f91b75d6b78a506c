"""Checkpoints of one rank: exact resume after SIGKILL, atomicity, failures, retention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import SECTIONS, RecordedFeed, life, train_run
from transformers import AutoModelForCausalLM

from slime_async.config import Config
from slime_async.learner.checkpoint.checkpointer import Checkpointer
from slime_async.learner.checkpoint.directory import CheckpointDirectory, CheckpointError, next_incarnation
from slime_async.learner.checkpoint.state import LearnerState
from slime_async.learner.megatron.checkpoint import FileSystemWriter
from slime_async.telemetry.metrics import read_metrics

DEADLINE_S = 60.0
Checkpoints = Callable[[str], Path]


def make_config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate({name: SECTIONS.get(name, {}) | sections.get(name, {}) for name in SECTIONS | sections})


def run_until_killed(config: Config, model: Path, run: Path, stop: int) -> None:
    """A learner in a process of its own, killed in the middle of the step after the batch ``stop`` was trained."""
    program = [sys.executable, str(Path(__file__).with_name("recorded.py"))]
    arguments = [str(run), str(model), config.model_dump_json(), str(stop)]
    process = subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(DEADLINE_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        said = list(iter(process.stdout.readline, f"trained {stop}\n")) if stop >= 0 else []
        assert [*said, f"trained {stop}\n"] == [f"trained {v}\n" for v in range(stop + 1)]
    finally:
        watchdog.cancel()
        process.kill()
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -9, errors[-3000:]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


STEP_TIMES = ("_s", "time")


def lines(run: Path) -> list[dict[str, Any]]:
    """What the run says of its steps, without what depends on time or on who said it."""
    kept = (dict(line) for line in read_metrics(run / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.endswith("_s") and k != "incarnation"} for line in kept]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"dtype": "bfloat16"}, "megatron": {"use_distributed_optimizer": True}},
    ],
    ids=["fp32", "bf16 distributed optimizer"],
)
def test_a_learner_killed_and_resumed_ends_with_bitwise_the_weights_of_one_that_was_not(
    sections: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    config, model = make_config(**sections), checkpoints("qwen3")
    straight, durable = train_run(config, model, tmp_path / "straight")
    assert durable == [3, 6]
    run = tmp_path / "killed"
    run_until_killed(config, model, run, stop=4)
    directory = CheckpointDirectory(run / "checkpoints")
    assert directory.latest() == 3
    resumed, durable = train_run(config, model, run)
    assert durable == [6]
    assert same(resumed, straight)
    assert [line["step"] for line in lines(run)] == list(range(6))
    assert lines(run) == lines(tmp_path / "straight")
    assert {line["step"]: line["incarnation"] for line in read_metrics(run / "metrics.jsonl")} == {
        **dict.fromkeys(range(3), 1),
        **dict.fromkeys(range(3, 6), 2),
    }
    state = LearnerState.read(directory.of(6))
    assert (state.incarnation, state.version, state.data.trajectories, state.data.tasks) == (2, 6, 36, 18)
