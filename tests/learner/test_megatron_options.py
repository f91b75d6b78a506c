"""The [megatron] section: what is passed on, and what is refused with the numbers that clash."""

from __future__ import annotations

from typing import Any

import pytest

from slime_async.learner.megatron.architecture import Architecture, Experts
from slime_async.learner.megatron.options import check_layout, parse_options

DENSE = Architecture(
    model_type="qwen3",
    layers=4,
    hidden_size=32,
    heads=4,
    groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    vocab_size=33,
    max_positions=64,
    norm_eps=1e-6,
    rope_theta=1e4,
    rope_factor=None,
    tied=True,
    experts=None,
)
SPARSE = Architecture(
    **{name: getattr(DENSE, name) for name in DENSE.__slots__ if name != "experts"},
    experts=Experts(count=4, per_token=2, hidden_size=12, normalized=True),
)


def test_options_reach_every_config_that_has_the_field() -> None:
    options = parse_options({"use_distributed_optimizer": True, "recompute_granularity": "full"}, 1)
    assert options.ddp == {"use_distributed_optimizer": True}
    assert options.optimizer == {"use_distributed_optimizer": True}
    assert options.model == {"recompute_granularity": "full"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_model_parallel": 2}, "did you mean 'tensor_model_parallel_size'"),
        ({"qqqq": 1}, "no field of Megatron's"),
        ({"hidden_size": 32}, r"config\.json"),
        ({"lr": 1e-3}, r"learner\.learning_rate"),
        ({"bf16": True}, r"model\.dtype"),
        ({"sequence_parallel": 1}, "must be of type bool"),
        ({"tensor_model_parallel_size": "2"}, "must be of type int"),
    ],
)
def test_an_option_that_cannot_be_set_is_refused_with_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(options, 1)


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (3, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "3 ranks cannot be divided by tensor 2"),
        (4, {"tensor_model_parallel_size": 4}, "2 key/value heads cannot be divided by .* = 4"),
        (8, {"tensor_model_parallel_size": 8}, "4 attention heads cannot be divided by .* = 8"),
        (3, {"pipeline_model_parallel_size": 3}, "4 layers cannot be divided by .* = 3"),
        (4, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 3}, "4 layers .* 3 = 12"),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, r"\(now 2\) above 2"),
        (2, {"expert_model_parallel_size": 2}, "the model has no experts"),
        (1, {"sequence_parallel": True}, "needs tensor_model_parallel_size above 1"),
        (1, {"tensor_model_parallel_size": 0}, "at least 1"),
        (1, {"moe_router_load_balancing_type": "sinkhorn"}, "the learner takes 'aux_loss'"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(world_size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(parse_options(options, world_size).layout, DENSE, options)


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (3, {"expert_model_parallel_size": 3}, "4 experts cannot be divided by .* = 3"),
        (2, {"expert_model_parallel_size": 4}, "2 ranks cannot be divided by expert 4"),
        (2, {"tensor_model_parallel_size": 2}, "needs sequence_parallel = true"),
    ],
)
def test_a_layout_of_experts_that_cannot_work_is_refused(
    world_size: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(parse_options(options, world_size).layout, SPARSE, options)


def test_what_is_left_of_the_ranks_is_data_parallel() -> None:
    options = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    layout = parse_options(options, 8).layout
    check_layout(layout, DENSE, options)
    assert layout.data == 2
