"""Routing replay: the learner takes the experts that an engine recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_job import recorded_experts, train_sequences
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from slime_async.learner.trainer import Trainer

SEQUENCES = [np.random.default_rng(i).integers(0, 33, 24).astype(np.int32) for i in range(16)]


def sampled_in_half_precision(checkpoint: Path) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int16]]]:
    """Log-probs and experts of an engine in bfloat16, as transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    logprobs, experts = [], []
    for tokens in SEQUENCES:
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            out = model(ids[None], output_router_logits=True)
        chosen = [layer.float().topk(2, -1).indices for layer in out.router_logits]
        experts.append(torch.stack(chosen, 1).numpy().astype(np.int16))
        logprobs.append(out.logits[0].float().log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy())
    return logprobs, experts


def test_replay_removes_the_mismatch_that_other_experts_make(
    make_trainer: Callable[..., Trainer], checkpoints: Callable[[str], Path]
) -> None:
    behavior, experts = sampled_in_half_precision(checkpoints("qwen3-moe"))
    trainer = make_trainer("qwen3-moe")
    own, replayed = trainer.logprobs(SEQUENCES), trainer.logprobs(SEQUENCES, experts)
    mismatch, mismatch_replayed = (
        np.abs(np.concatenate([x[1:] for x in columns]) - np.concatenate(behavior)) for columns in (own, replayed)
    )
    assert mismatch.max() > 0.2, "some token took another expert"
    assert mismatch_replayed.max() < mismatch.max() / 2
    assert mismatch_replayed.mean() < mismatch.mean()


def test_where_nothing_was_recorded_the_router_chooses(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer("qwen3-moe")
    own = np.concatenate(trainer.logprobs(SEQUENCES))
    unrecorded = [np.full((len(tokens), 2, 2), -1, dtype=np.int16) for tokens in SEQUENCES]
    np.testing.assert_array_equal(np.concatenate(trainer.logprobs(SEQUENCES, unrecorded)), own)
    others = [recorded_experts(np.random.default_rng(1), len(tokens)) for tokens in SEQUENCES]
    assert np.abs(np.concatenate(trainer.logprobs(SEQUENCES, others)) - own).max() > 0.1


def test_recomputed_layers_take_the_same_experts_again(make_trainer: Callable[..., Trainer]) -> None:
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    norms = []
    for megatron in ({}, full):
        trainer = make_trainer("qwen3-moe", megatron=megatron, learner={"microbatch_tokens": 32})
        norms.append(trainer.train_policy(train_sequences(experts=True), 0).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_replay_can_be_turned_off(make_trainer: Callable[..., Trainer]) -> None:
    norms = [
        make_trainer("qwen3-moe", learner={"replay_routing": replay})
        .train_policy(train_sequences(experts=experts), 0)
        .grad_norm
        for replay, experts in ((False, True), (True, False), (True, True))
    ]
    assert norms[0] == norms[1] != norms[2]


def test_records_of_another_model_are_refused(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match="a qwen3 model has none"):
        make_trainer().train_policy(train_sequences(experts=True), 0)
    sequences = train_sequences(experts=True)
    experts = sequences[1].routed_experts
    assert experts is not None
    experts[0, 0, 0] = 4
    with pytest.raises(ValueError, match="do not fit this model"):
        make_trainer("qwen3-moe").train_policy(sequences, 0)
