"""Evaluation counts what was solved, what failed, and plays no more episodes at once than it may."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from slime_async.actors.engine import EngineError
from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task
from slime_async.actors.evaluate import evaluate_checkpoint, evaluate_source
from slime_async.actors.rollout import Rollout, RolloutSettings
from slime_async.cli.eval import result_line
from slime_async.config.schema import Config
from slime_async.demo.model import make_checkpoint
from slime_async.protocol import EvaluationResult
from tests.actors.scripted import SAMPLING, TOKENIZER, ScriptedEngine, ScriptedProcess, says


class Games:
    """Tasks whose content is their reward; a text is an episode that fails. Counts how many run at once."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0

    async def generate(self, task: Task, policy: Policy) -> Episode:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        episode = EpisodeBuilder()
        episode.add(await policy.sample([1]))
        self.running -= 1
        return episode.finish(float(task.content))


def evaluate(
    tasks: list[Any], num_tasks: int, *, source: str = "held-out", slots: int = 2, samples: int = 1
) -> EvaluationResult:
    games = Games()
    settings = RolloutSettings(SAMPLING, TOKENIZER, games.generate, None, 0, 64, 30.0)
    rollout = Rollout(settings, {"held-out": tasks}, ScriptedEngine([says("1")]))
    summary = asyncio.run(evaluate_source(rollout, source, num_tasks, slots, samples=samples))
    assert games.most <= slots
    return summary


@pytest.mark.parametrize(
    ("tasks", "num_tasks", "summary"),
    [
        ([1.0, 0.0, 1.0, 1.0], 4, EvaluationResult("held-out", (1.0, 0.0, 1.0, 1.0), 0, (0,))),
        ([1.0, 0.5, 1.0, 1.0], 2, EvaluationResult("held-out", (1.0, 0.5), 0, (0,))),
        ([1.0, "fails", 1.0, 0.0], 4, EvaluationResult("held-out", (1.0, 1.0, 0.0), 1, (0,))),
        ([1.0, 1.0], 10, EvaluationResult("held-out", (1.0, 1.0), 0, (0,))),
    ],
)
def test_rewards_are_of_those_that_finished_and_the_others_are_counted(
    tasks: list[Any], num_tasks: int, summary: EvaluationResult
) -> None:
    assert evaluate(tasks, num_tasks) == summary


def test_several_answers_per_task_come_by_task() -> None:
    result = evaluate([1.0, "fails", 0.0], 3, samples=2)
    assert (result.rewards, result.failed, result.counts) == ((1.0, 1.0, 0.0, 0.0), 2, (2, 0, 2))
    line = result_line(result, samples=2)
    assert line.startswith(
        "held-out: accuracy 0.3333 (0.0000 to 0.9867), pass@2 0.3333, mean reward 0.5000, 3 tasks, 2"
    )


def test_an_evaluation_in_which_everything_fails_has_no_mean_reward() -> None:
    summary = evaluate(["fails"], 1)
    assert (summary.accuracy, summary.failed, summary.versions) == (0.0, 1, ())
    assert "accuracy 0.0000 (0.0000 to 0.7935), mean reward nan" in result_line(summary, samples=1)


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no source 'heldout' to evaluate: the configuration has \['held-out'\]"):
        evaluate([1.0], 1, source="heldout")


def test_an_evaluation_of_no_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_tasks = 0"):
        evaluate([1.0], 0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, seed=0)
    return tmp_path


SORTING = Config.model_validate(
    {
        "task": {
            "reward": "slime_async.demo.sorting:reward",
            "evaluation": {"held-out": {"factory": "slime_async.demo.sorting:held_out"}},
        }
    }
)


def test_a_checkpoint_is_evaluated_on_an_engine_that_is_closed_afterwards(checkpoint: Path) -> None:
    engine = ScriptedProcess([says("0")])
    summary = asyncio.run(evaluate_checkpoint(SORTING, checkpoint, "held-out", 5, engine))
    assert (summary.accuracy, summary.failed, summary.tasks) == (0.0, 0, 5)
    assert engine.state == "closed"


def test_an_engine_without_weights_is_refused_and_closed(checkpoint: Path) -> None:
    engine = ScriptedProcess([says("0")])
    engine.weights = None
    with pytest.raises(EngineError, match="engine scripted holds no weights"):
        asyncio.run(evaluate_checkpoint(SORTING, checkpoint, "held-out", 5, engine))
    assert engine.state == "closed"
