"""The contract test finds what would spoil training, and has nothing to say about sound tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slime_async.actors import check_source
from slime_async.actors.check import CheckReport, check_task
from slime_async.config import Config, load_config
from slime_async.demo.model import make_checkpoint

ROOT = Path(__file__).parents[2]
TASKS = "tests.actors.tasks_to_check"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(directory, 0)
    return directory


@pytest.fixture(autouse=True)
def sources_are_the_same_elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes seconds to start: only the test of sources looks into one."""
    if "by_hash" not in request.node.name:
        same = lambda source: check_source.digest(check_source.load_source(source))  # noqa: E731
        monkeypatch.setattr(check_source, "_digest_in_another_process", same)


def check(checkpoint: Path, generate: str = "sound", reward: str = "exact", source: str = "tasks") -> CheckReport:
    table: dict[str, Any] = {
        "model": {"path": str(checkpoint)},
        "sampling": {"max_new_tokens": 6, "max_context_tokens": 48},
        "task": {
            "generate": f"{TASKS}:{generate}",
            "reward": f"{TASKS}:{reward}",
            "train": {"s": {"factory": f"{TASKS}:{source}"}},
        },
    }
    return check_task(Config.model_validate(table), checkpoint, answers=["12"])


def test_a_sound_task_with_branches_passes(checkpoint: Path) -> None:
    report = check(checkpoint)
    report.raise_for_errors()
    assert report.episodes == 16
    assert report.turns >= 64
    assert len(set(report.rewards)) > 1, "a given answer earns something"


@pytest.mark.parametrize("name", ["demo", "agent"])
def test_the_examples_pass(name: str, checkpoint: Path) -> None:
    check_task(load_config(ROOT / "examples" / f"{name}.toml"), checkpoint).raise_for_errors()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"generate": "tokenises_again"}, "but the engine sampled|were not sampled by the engine"),
        ({"generate": "invents_logprobs"}, "but the engine sampled"),
        ({"generate": "trains_twice"}, "branch 1: the tokens trained from position 1 on .* trained twice"),
        ({"generate": "shares_state"}, "depends on something besides its task"),
        ({"generate": "swallows_cancellation"}, "leaves tasks behind: a telegraph"),
        ({"reward": "moody"}, "the same answers earned"),
        ({"reward": "infinite"}, "reward is inf"),
        ({"source": "by_clock"}, "source 's' holds other tasks when it is built again"),
    ],
)
def test_a_broken_task_is_found_out(task: dict[str, str], message: str, checkpoint: Path) -> None:
    report = check(checkpoint, **task)
    with pytest.raises(AssertionError, match=message):
        report.raise_for_errors()


def test_a_source_that_depends_on_its_process_is_found_out_by_hash(checkpoint: Path) -> None:
    with pytest.raises(AssertionError, match="source 's' holds other tasks in another process"):
        check(checkpoint, source="by_hash").raise_for_errors()


def test_answers_that_are_not_trained_and_rewards_that_never_differ_are_worth_a_warning(checkpoint: Path) -> None:
    report = check(checkpoint, generate="leaves_turns_out")
    report.raise_for_errors()
    assert any("answers of the engine are not trained" in warning for warning in report.warnings)
    assert any("all 16 rewards are 1" in warning for warning in report.warnings)
