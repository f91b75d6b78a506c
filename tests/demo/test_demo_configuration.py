"""What examples/demo.toml names exists and fits together."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path

import pytest

from slime_async.actors.engine import GenerateRequest, Generation
from slime_async.actors.evaluate import evaluate_source
from slime_async.actors.rollout import make_rollout
from slime_async.config.schema import Config
from slime_async.demo.tokenizer import EOS
from slime_async.objects import load_callable
from tests.actors.scripted import ScriptedEngine, says

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config() -> Config:
    """The sections that actors read."""
    table = tomllib.loads((ROOT / "examples" / "demo.toml").read_text())
    return Config.model_validate({name: table[name] for name in ("run", "model", "task", "sampling", "warm_start")})


@pytest.fixture(scope="module")
def checkpoint(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    load_callable(config.model.path, "model.path")(directory, config.run.seed)
    return directory


def test_an_engine_that_sorts_solves_the_held_out_tasks(config: Config, checkpoint: Path) -> None:
    alphabet = "0123456789+-="

    def sorts(request: GenerateRequest) -> Generation:
        sign, *digits = (alphabet[token] for token in request.prompt_ids[:-1])
        return says("".join(sorted(digits, reverse=sign == "-")))

    rollout = make_rollout(config, checkpoint, ScriptedEngine([sorts]))
    summary = asyncio.run(evaluate_source(rollout, "held-out", num_tasks=64, slots=8))
    assert (summary.accuracy, summary.failed, summary.tasks) == (1.0, 0, 64)


def test_prompts_and_answers_fit_into_the_context(config: Config, checkpoint: Path) -> None:
    engine = ScriptedEngine([says("0")])
    rollout = make_rollout(config, checkpoint, engine)
    asyncio.run(evaluate_source(rollout, "sorting", num_tasks=8, slots=8))
    for request in engine.requests:
        assert request.sampling.max_new_tokens == config.sampling.max_new_tokens
        assert len(request.prompt_ids) + request.sampling.max_new_tokens <= config.sampling.max_context_tokens


def test_every_demonstration_fits_into_an_answer(config: Config) -> None:
    demonstrations = load_callable(config.warm_start.demonstrations, "warm_start.demonstrations")(config.run.seed)
    for prompt, answer in (demonstrations[i] for i in range(100)):
        assert EOS not in prompt + answer
        assert len(answer) + 1 <= config.sampling.max_new_tokens
