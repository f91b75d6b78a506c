"""The worked examples of the documentation run as they are printed."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from slime_async.actors import check_source
from slime_async.actors.check import check_task
from slime_async.actors.environment import Task
from slime_async.actors.plugins import load_generate, load_reward
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.actors.sources import load_sources
from slime_async.branches import branches
from slime_async.cli.dry_run import shrink
from slime_async.config.load import make_config
from slime_async.config.schema import Config
from slime_async.trajectory import TaskRef
from tests.actors.scripted import ScriptedEngine
from tests.actors.test_chat import CHAT, SAMPLING, says

TEXT = (Path(__file__).parents[2] / "docs" / "worked-examples.md").read_text()


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block, in the file that its first line names."""
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL):
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        check_source, "_digest_in_another_process", lambda s: check_source.digest(check_source.load_source(s))
    )


def configuration(name: str) -> Config:
    (block,) = re.findall(rf"```toml\n# {name}\n(.*?)```", TEXT, re.DOTALL)
    return make_config(tomllib.loads(block), {}, file=name)


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("units.toml", ["<answer>5000</answer>", "<answer>1.2.3</answer>"]),
        ("shop.toml", ["40", '<tool_call>{"name": "stock", "arguments": {"good": "tea"}}</tool_call>']),
    ],
)
def test_a_worked_example_keeps_the_contract(name: str, answers: list[str], tmp_path: Path) -> None:
    config = configuration(name)
    small = shrink(config, tmp_path, new_tokens=64)
    report = check_task(small, Path(small.model.path), answers=answers)
    report.raise_for_errors()
    assert report.turns >= report.episodes


def test_right_conversions_are_rewarded() -> None:
    config = configuration("units.toml")
    reward: Any = load_reward(config.task)
    for content in (load_sources(config.task)["units"][i] for i in range(20)):
        assert reward(content, f"<answer>{content['answer']:.9f}</answer>", "stop") == 1.0
        assert reward(content, f"<answer>{2 * content['answer']:.9f}</answer>", "stop") == 0.0
        assert reward(content, str(content["answer"]), "stop") == 0.0


def test_the_shops_agent_asks_adds_and_is_one_sequence() -> None:
    config = configuration("shop.toml")
    content = load_sources(config.task)["shop"][0]
    goods = re.findall(r"How many (\w+) and (\w+)", content["question"])[0]
    calls = [f"<tool_call>{json.dumps({'name': 'stock', 'arguments': {'good': good}})}</tool_call>" for good in goods]
    engine = ScriptedEngine([says("".join(calls)), says(content["answer"])])

    async def play() -> Any:
        generate = load_generate(config.task)
        policy = EnginePolicy(engine, SAMPLING, EpisodeLimits(8192), seed=0)
        task = Task(TaskRef(0, "shop", 0), 0, content, SAMPLING, CHAT, load_reward(config.task))
        try:
            async with asyncio.timeout(60):
                return await generate(task, policy)
        finally:
            await generate.__self__.close()  # type: ignore[attr-defined]

    trajectory = asyncio.run(play()).to_trajectory(TaskRef(0, "shop", 0), 0, 0)
    assert trajectory.reward == 1.0
    assert len(branches(trajectory)) == 1
    given = CHAT.decode(trajectory.token_ids[trajectory.loss_mask == 0])
    for good in goods:
        assert f"<tool_response>\n{content['stock'][good]}\n</tool_response>" in given
