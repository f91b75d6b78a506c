"""What a user can get wrong in the file or the flags, and what each is told."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slime_async.config import Config, ConfigError, load_config, make_config
from slime_async.config.load import Key

SOUND = """
model.path = "package.models:small"
[task.train.sums]
factory = "package.tasks:sums"
[task.evaluation.held_out]
factory = "package.tasks:held_out"
"""

FILES = [
    (
        "misspelt key",
        "[staleness]\nmax_stalenes = 3",
        ["unknown key staleness.max_stalenes in demo.toml", "did you mean max_staleness?"],
    ),
    ("misspelt section", "[stalenes]\nmax_staleness = 3", ["unknown key stalenes", "did you mean staleness?"]),
    (
        "key of another section",
        "[run]\nlearning_rate = 1.0",
        ["unknown key run.learning_rate", "did you mean learner.learning_rate?"],
    ),
    ("key like no other", "[hub]\nzzz = 1", ["unknown key hub.zzz", "[hub] has address, insecure"]),
    ("key inside a source", "[task.train.x]\nfactory = 'a:b'\nwieght = 2", ["unknown key task.train.x.wieght"]),
    ("source without factory", "[task.train.x]\nweight = 2", ["task.train.x.factory is missing"]),
    ("wrong type", "[run]\nsteps = 'many'", ["demo.toml: run.steps = 'many' is wrong", "valid integer"]),
    ("out of range", "[learner]\nlearning_rate = -1.0", ["learner.learning_rate = -1.0 is wrong", "greater than 0"]),
    (
        "not a choice",
        "[staleness]\non_stale = 'skip'",
        ["staleness.on_stale = 'skip'", "'mask', 'drop', 'wait' or 'train'"],
    ),
    ("value for a section", "learner = 3", ["learner = 3", "learner is a section", "[learner]"]),
    (
        "context too short",
        "sampling = {max_new_tokens = 64, max_context_tokens = 64}",
        ["sampling.max_new_tokens = 64", "max_context_tokens = 64"],
    ),
    (
        "overlong from the first token on",
        "task.overlong_tokens = 65\nsampling.max_new_tokens = 64",
        ["task.overlong_tokens = 65", "limit of 64"],
    ),
    (
        "failed before it is truncated",
        "sampling.truncate_after_s = 60\nactor.episode_timeout_s = 60",
        ["sampling.truncate_after_s = 60", "actor.episode_timeout_s = 60"],
    ),
    (
        "queue below a batch",
        "batch = {groups = 4, group_size = 8, queue_trajectories = 31}",
        ["batch.queue_trajectories = 31", "32 trajectories", "batch.groups = 4 × batch.group_size = 8"],
    ),
    (
        "trajectory above the queue",
        "batch = {queue_bytes = 10, max_trajectory_bytes = 11}",
        ["batch.max_trajectory_bytes = 11", "batch.queue_bytes = 10"],
    ),
    (
        "uneven minibatches",
        "batch.groups = 5\nlearner.optimizer_steps = 2",
        ["batch.groups = 5", "learner.optimizer_steps = 2"],
    ),
    ("not a function", "task.reward = 'package.reward'", ["task.reward = 'package.reward'", "package.module:function"]),
    ("warm start on nothing", "warm_start.steps = 5", ["warm_start.steps = 5", "warm_start.demonstrations"]),
    (
        "control without warm start",
        "warm_start.control_steps = 5",
        ["warm_start.control_steps = 5", "warm_start.steps = 0"],
    ),
    (
        "deterministic but asynchronous",
        "run.deterministic = true",
        ["run.deterministic = true", "staleness.max_staleness = 0, which is 2"],
    ),
    (
        "deterministic on many threads",
        "run.deterministic = true\nlearner.threads = 4",
        ["run.deterministic = true", "learner.threads = 1, which is 4"],
    ),
    ("address without a port", "hub.address = 'tcp://here'", ["hub.address = 'tcp://here'", "tcp://HOST:PORT"]),
    (
        "hasty heartbeat",
        "hub = {heartbeat_interval_s = 5.0, heartbeat_timeout_s = 10.0}",
        ["hub.heartbeat_timeout_s = 10.0", "more than 10.0"],
    ),
    ("name with a slash", "run.name = 'a/b'", ["run.name = 'a/b'"]),
    (
        "source in both",
        "task.train.held_out.factory = 'a:b'",
        ["'held_out' is both in task.train and in task.evaluation"],
    ),
]


@pytest.mark.parametrize(("text", "parts"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_a_mistake_in_the_file_is_named_with_its_remedy(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(join(tomllib.loads(SOUND), tomllib.loads(text)), {}, "demo.toml")
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "pydantic" not in str(error.value)


OVERRIDES: list[tuple[str, dict[Key, Any], list[str]]] = [
    ("wrong value", {("learner", "learning_rate"): "fast"}, ["flag --learner.learning-rate", "'fast'", "valid number"]),
    ("inside a source", {("task", "train", "x", "weight"): 2}, ["flag --task.train.x.weight", "factory is missing"]),
    ("into a value", {("run", "name", "x"): 2}, ["flag --run.name.x", "run.name = {'x': 2}", "valid string"]),
]


@pytest.mark.parametrize(("flags", "parts"), [case[1:] for case in OVERRIDES], ids=[case[0] for case in OVERRIDES])
def test_a_mistake_in_a_flag_names_the_flag(tmp_path: Path, flags: Mapping[Key, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(_sound(tmp_path), flags)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "demo.toml"
    path.write_text("[run]\nsteps = 0\nnmae = 'x'\n[learner]\nranks = 0\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert len(str(error.value).splitlines()) == 3


def test_a_configuration_without_task_says_what_to_add(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for part in ("model.path is not set", "[task.train.NAME]", "[task.evaluation.NAME]", "evaluation.before = false"):
        assert part in str(error.value)


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[run]\nsteps = = 3\n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML: .*line 2"):
        load_config(path)


def test_a_missing_file_names_its_path_and_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file .*absent\.toml.*give the path of a TOML file"):
        load_config(tmp_path / "absent.toml")


def test_a_directory_or_binary_file_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read configuration file"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.toml")


def test_flags_win_over_the_file_and_the_rest_stays(tmp_path: Path) -> None:
    config = load_config(_sound(tmp_path), {("run", "steps"): 7, ("megatron", "bf16"): True})
    assert (config.run.steps, config.megatron, config.model.path) == (7, {"bf16": True}, "package.models:small")


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run = Config().run  # type: ignore[misc]


def _sound(directory: Path) -> Path:
    path = directory / "sound.toml"
    path.write_text(SOUND)
    return path


def join(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """``right`` over ``left``, table by table."""
    inner = {key: join(left[key], right[key]) for key in left.keys() & right.keys() if isinstance(right[key], dict)}
    return left | right | inner


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({("actor", "engine_urls"): ["http://a:1"]}, r"http://a:1.* name SGLang servers.*set actor\.engine = 'sglang'"),
        ({("actor", "record_routing"): True}, r"record_routing = true needs actor\.engine = 'sglang'"),
        ({("sglang", "tp_size"): 2}, r"\[sglang\] sets tp_size, but actor\.engine = 'embedded'"),
        (
            {("actor", "engine"): "sglang", ("actor", "engine_urls"): ["a:1"]},
            r"'a:1' is no URL: write http://HOST:PORT",
        ),
        (
            {("actor", "engine"): "sglang", ("actor", "engine_urls"): ["http://a:1"], ("actor", "count"): 2},
            r"one actor, but actor\.count = 2",
        ),
        (
            {
                ("actor", "engine"): "sglang",
                ("actor", "engine_urls"): ["http://a:1"],
                ("sglang", "tp_size"): 2,
                ("sglang", "api_key"): "secret",
            },
            r"\[sglang\] sets tp_size, but the servers of actor\.engine_urls are started elsewhere",
        ),
        (
            {("actor", "engine"): "sglang", ("run", "deterministic"): True, ("staleness", "max_staleness"): 0},
            r"deterministic = true needs actor\.engine = 'embedded'",
        ),
    ],
)
def test_engines_that_cannot_be_had_together_are_refused(
    settings: dict[tuple[str, ...], Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(_sound(tmp_path), settings)
