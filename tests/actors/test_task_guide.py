"""The examples of docs/tasks.md run as they are printed."""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from slime_async.actors.evaluate import evaluate_source
from slime_async.actors.judging import Group, Sample
from slime_async.actors.rollout import Rollout, RolloutSettings
from slime_async.actors.sources import load_sources
from slime_async.config.schema import Config, SourceConfig, TaskConfig
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
    assert (summary.accuracy, summary.failed, summary.tasks) == (0.25, 0, 4)
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


def test_the_example_with_branches_compares_solvers_with_solvers() -> None:
    from slime_async.branches import branches, role_id

    config = TaskConfig(generate="debate:generate", train={"words": SourceConfig(factory="debate:source")})
    plays, _ = rollout(config, [says("1"), says("21"), says("1")])
    trajectory = asyncio.run(plays.run(Reservation(TaskRef(0, "words", 12), sample=0, attempt=0)))
    assert isinstance(trajectory, Trajectory)
    found = branches(trajectory)
    assert [branch.role for branch in found] == [role_id("solver"), role_id("solver"), role_id("critic")]
    assert (trajectory.reward, [branch.final_reward for branch in found]) == (1.0, [1.0, 1.0, 1.0])
    assert [branch.own_reward for branch in found] == [False, False, True]


def test_the_example_of_a_group_reward_prefers_the_shortest_right_answer() -> None:
    def sample(reward: float, tokens: int) -> Sample:
        return Sample(("x",), "x", reward, "stop", tokens, {})

    group = Group(None, (sample(1.0, 9), sample(1.0, 4), sample(0.0, 2)))
    assert load_callable("shortest:group_reward", "task.group_reward")(group) == [1.0, 2.0, 0.0]
    assert load_callable("shortest:keep", "task.filter")(group)


def test_the_example_of_data_from_files_reads_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = [b for b in re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL) if "stories" in b]
    source = load_sources(Config.model_validate(tomllib.loads(block)).task)["stories"]
    assert source[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert source[0]["answer"].splitlines()[-1].startswith("#### ")
