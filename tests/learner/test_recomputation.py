"""Trading time for memory changes no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layout_job import train_sequences

from slime_async.learner.megatron.fused import swiglu
from slime_async.learner.megatron.layers import kept_as
from slime_async.learner.trainer import Trainer

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WAYS: list[dict[str, Any]] = [
    {"learner": {"recompute_elementwise": True}},
    {"learner": {"keep_logits": True}},
    {"megatron": FULL},
    {"megatron": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]}},
]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3-moe"])
def test_recomputation_trains_the_same(architecture: str, make_trainer: Callable[..., Trainer]) -> None:
    results = []
    for way in ({}, *WAYS):
        learner = {"microbatch_tokens": 48, "learning_rate": 1e-2} | way.get("learner", {})
        trainer = make_trainer(architecture, learner=learner, megatron=way.get("megatron", {}))
        steps = [trainer.train_policy(train_sequences(), version) for version in range(2)]
        results.append([x for step in steps for x in (step.loss, step.grad_norm)])
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)  # 1.5e-6 apart on some CPUs, after a step


def test_two_kinds_of_recomputation_at_once_are_refused(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        make_trainer(learner={"recompute_elementwise": True}, megatron=FULL)


def test_a_tensor_that_can_be_recomputed_is_not_kept() -> None:
    gate_up = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(4, 5, requires_grad=True)
    calls = []

    def again() -> torch.Tensor:
        calls.append(1)
        return swiglu(gate_up.detach())

    inner = swiglu(gate_up)
    with kept_as(inner, again):
        out = inner @ weight
    with torch.no_grad():
        inner.zero_()  # what autograd would refuse, had it kept the tensor
    out.sum().backward()
    assert calls == [1]
    torch.testing.assert_close(weight.grad, swiglu(gate_up.detach()).sum(0)[:, None].expand(4, 5))
