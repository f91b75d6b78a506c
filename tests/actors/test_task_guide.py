"""The examples of docs/tasks.md run as they are printed."""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from slime_async.actors.evaluate import EvaluationSummary, evaluate_source
from slime_async.actors.rollout import Rollout, RolloutSettings
from slime_async.actors.sources import load_sources
from slime_async.config.schema import Config, TaskConfig
from slime_async.objects import load_callable
from slime_async.protocol import Reservation
from slime_async.trajectory import TaskRef, Trajectory
from tests.actors.scripted import SAMPLING, TOKENIZER, Answer, ScriptedEngine, says

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "tasks.md").read_text()


@pytest.fixture(autouse=True)
def modules_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block, in the file that its first line names."""
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", GUIDE, re.DOTALL):
        assert len(code.splitlines()) < 40
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


def configuration(number: int) -> TaskConfig:
    table: dict[str, Any] = tomllib.loads(re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)[number])
    return Config.model_validate(table).task


def rollout(task: TaskConfig, script: list[Answer]) -> tuple[Rollout, ScriptedEngine]:
    reward = load_callable(task.reward, "task.reward") if task.reward else None
    generate = load_callable(task.generate, "task.generate")
    engine = ScriptedEngine(script)
    settings = RolloutSettings(SAMPLING, TOKENIZER, generate, reward, 0, 64, 30.0)
    return Rollout(settings, load_sources(task), engine), engine


def test_the_single_turn_example_rewards_right_sums_alone() -> None:
    task = configuration(0)
    wanted = load_sources(task)["held-out-sums"][0]["answer"]
    plays, engine = rollout(task, [says(wanted), says("0")])
    summary = asyncio.run(evaluate_source(plays, "held-out-sums", num_tasks=4, slots=1))
    assert summary == EvaluationSummary(accuracy=0.25, mean_reward=0.25, failed=0, tasks=4)
    assert TOKENIZER.decode(engine.requests[0].prompt_ids) == load_sources(task)["held-out-sums"][0]["prompt"]


def test_the_multi_turn_example_is_one_sequence_with_the_hints_untrained() -> None:
    plays, engine = rollout(configuration(1), [says("50"), says("9="), says("20"), says("30")])
    trajectory = asyncio.run(plays.run(Reservation(TaskRef(0, "numbers", 20), sample=0, attempt=0)))
    assert isinstance(trajectory, Trajectory)
    assert TOKENIZER.decode(trajectory.token_ids) == "=50<eos>-9=<eos><unk>20<eos>+30<eos>"
    given = trajectory.token_ids[trajectory.loss_mask == 0]
    assert TOKENIZER.decode(given) == "=-<unk>+"
    assert (trajectory.reward, trajectory.metrics) == (1.0, {"guesses": 4.0})
    assert len({request.session for request in engine.requests}) == 1


def test_the_multi_turn_example_ends_when_guesses_run_out() -> None:
    plays, engine = rollout(configuration(1), [says("50")])
    trajectory = asyncio.run(plays.run(Reservation(TaskRef(0, "numbers", 20), sample=0, attempt=0)))
    assert isinstance(trajectory, Trajectory)
    assert (trajectory.reward, trajectory.finish_reason, len(engine.requests)) == (0.0, "out_of_guesses", 8)
