"""What a resumed run may change."""

from __future__ import annotations

from typing import Any

import pytest

from slime_async.config import Config
from slime_async.config.resume import fixed_settings, refused_changes

SORT = {"factory": "slime_async.demo.sorting:train"}


def make_config(**sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {"task": {"train": {"sort": SORT}}, "megatron": {"tensor_model_parallel_size": 2}}
    return Config.model_validate(base | sections)


@pytest.mark.parametrize(
    "free",
    [
        {"run": {"steps": 7, "directory": "elsewhere"}},
        {"actor": {"count": 3, "slots": 4}},
        {"learner": {"ranks": 4, "microbatch_tokens": 100}},
        {"megatron": {"pipeline_model_parallel_size": 4, "use_distributed_optimizer": True}},
        {"checkpoint": {"keep": 9}, "evaluation": {"tasks": 3}, "hub": {"heartbeat_timeout_s": 99.0}},
    ],
    ids=str,
)
def test_where_and_how_fast_a_run_computes_may_change(free: dict[str, Any]) -> None:
    assert refused_changes(make_config(), make_config(**free)) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"batch": {"groups": 4}}, "batch.groups = 4 cannot be set on resuming, the run has 32"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype = 'bfloat16' cannot be set on resuming, the run has 'float32'"),
        ({"staleness": {"max_staleness": 5}}, "staleness.max_staleness = 5 cannot be set on resuming, the run has 2"),
        ({"task": {"train": {"sort": SORT | {"weight": 2.0}}}}, "task.train = {'sort': {"),
        (
            {"megatron": {"tensor_model_parallel_size": 2, "adam_decay": 0.1}},
            "megatron.adam_decay = 0.1 cannot be set on resuming, the run has nothing",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_made_the_weights_may_not(change: dict[str, Any], line: str) -> None:
    [refused] = refused_changes(make_config(), make_config(**change))
    assert refused.startswith(line)
    assert "leave it out, or begin a new run" in refused


def test_a_deterministic_run_keeps_what_changes_rounding() -> None:
    settings = {"run": {"deterministic": True}}
    refused = refused_changes(make_config(**settings), make_config(**settings, learner={"ranks": 2}, megatron={}))
    assert [line.split(" = ")[0] for line in refused] == ["learner.ranks", "megatron.tensor_model_parallel_size"]


def test_restarts_of_the_learner_need_checkpoints() -> None:
    assert make_config(learner={"max_restarts": 5}).learner_restarts == 0
    assert make_config(learner={"max_restarts": 5}, checkpoint={"interval_steps": 1}).learner_restarts == 5
    assert "checkpoint.keep" not in fixed_settings(make_config())
