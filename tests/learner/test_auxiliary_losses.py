"""Auxiliary losses of routers: over the batch's tokens, whatever the microbatches, and they balance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from layout_job import train_sequences

from slime_async.learner.trainer import StepResult, Trainer

Z_LOSS = {"moe_z_loss_coeff": 0.5}


def step(make_trainer: Callable[..., Trainer], megatron: dict[str, Any], microbatch_tokens: int) -> StepResult:
    learner = {"microbatch_tokens": microbatch_tokens}
    return make_trainer("qwen3-moe", megatron=megatron, learner=learner).train_policy(train_sequences(), 0)


def test_a_token_counts_the_same_in_whichever_microbatch_it_is(make_trainer: Callable[..., Trainer]) -> None:
    without = step(make_trainer, {}, 1000)
    together, apart = (step(make_trainer, Z_LOSS, tokens) for tokens in (1000, 20))
    assert together.grad_norm == pytest.approx(apart.grad_norm, rel=1e-5)
    assert together.grad_norm != pytest.approx(without.grad_norm, rel=1e-2)
    assert "router/z_loss" in together.metrics
    assert not any(name.startswith("router/") for name in without.metrics)


def test_recomputed_layers_count_once(make_trainer: Callable[..., Trainer]) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kept, recomputed = (step(make_trainer, Z_LOSS | more, 64) for more in ({}, full))
    assert recomputed.grad_norm == pytest.approx(kept.grad_norm, rel=1e-5)
    assert recomputed.metrics["router/z_loss"] == pytest.approx(kept.metrics["router/z_loss"], rel=1e-5)


def test_the_balancing_loss_balances(make_trainer: Callable[..., Trainer]) -> None:
    balanced = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1.0}
    trainer = make_trainer("qwen3-moe", megatron=balanced, learner={"learning_rate": 1e-2})
    losses = [
        trainer.train_policy(train_sequences(), version).metrics["router/load_balancing_loss"] for version in range(20)
    ]
    assert losses[0] > 1.02
    assert losses[-1] - 1.0 < (losses[0] - 1.0) / 2
    assert trainer.model.config.moe_aux_loss_coeff == 1.0
