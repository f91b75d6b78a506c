"""The two that are compared: the learner, and what one would write with transformers.

Both make one optimizer step of PPO's clipped objective on the same tokens. A step is everything from host arrays to
updated weights.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.learner.cells import Cell
from benchmarks.learner.shapes import Shape
from slime_async.config.schema import Config
from slime_async.learner.sequences import TrainSequence

Step = Callable[[], float]
"""One whole step; the gradient's norm"""
LEARNING_RATE = 1e-6


def sequences_of(shape: Shape, lengths: NDArray[np.int64]) -> list[TrainSequence]:
    """Random tokens, of which the first eighth is the prompt; every sequence has an advantage."""
    rng = np.random.default_rng(1)
    return [
        TrainSequence(
            token_ids=rng.integers(0, shape.vocab_size, n).astype(np.int32),
            loss_mask=(np.arange(n) >= n // 8).astype(np.uint8),
            weight_mask=np.ones(n, dtype=np.uint8),
            behavior_logprobs=np.full(n, -np.log(shape.vocab_size), dtype=np.float32),
            advantages=float(rng.normal()),
            staleness=np.zeros(n, dtype=np.int64),
            group=i,
        )
        for i, n in enumerate(lengths.tolist())
    ]


def megatron_options(cell: Cell) -> dict[str, Any]:
    options: dict[str, Any] = {"use_distributed_optimizer": True}
    if cell.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return options


def learner_step(cell: Cell, shape: Shape, sequences: list[TrainSequence], dtype: str) -> Step:
    from slime_async.learner.trainer import Trainer

    config = Config(
        model={"dtype": dtype},
        learner={
            "learning_rate": LEARNING_RATE,
            "microbatch_tokens": cell.microbatch_tokens,
            "keep_logits": cell.keep_logits,
            "recompute_elementwise": cell.recompute == "selective",
        },
        megatron=megatron_options(cell),
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer.build(config, shape.write(Path(directory)), random_weights=True)
    return lambda: trainer.train_policy(sequences, 0).grad_norm


# ------------------------------------------------------------------------------------------------------ transformers


def transformers_step(
    cell: Cell, shape: Shape, sequences: list[TrainSequence], dtype: str, device: torch.device
) -> Step:
    """AutoModelForCausalLM in ``dtype``, fused AdamW on the same weights (no fp32 copies: faster, less exact)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if cell.attention == "varlen":
        _register_varlen()
    config = AutoConfig.for_model(**shape.config())
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=cell.attention
        )
    model.train()
    if cell.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=device.type == "cuda")
    microbatches = _microbatches(cell, sequences)
    counted = sum(s.sampled_tokens for s in sequences)

    def step() -> float:
        for chosen in microbatches:
            _backward(model, cell, chosen, counted, device)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return step


def _microbatches(cell: Cell, sequences: list[TrainSequence]) -> list[list[TrainSequence]]:
    """In order, each as many sequences as fit."""
    microbatches: list[list[TrainSequence]] = [[]]
    for sequence in sequences:
        held = sum(len(s.token_ids) for s in microbatches[-1])
        if microbatches[-1] and held + len(sequence.token_ids) > cell.microbatch_tokens:
            microbatches.append([])
        microbatches[-1].append(sequence)
    return microbatches


def _backward(model: Any, cell: Cell, chosen: list[TrainSequence], counted: int, device: torch.device) -> None:
    columns = [
        np.concatenate([x.astype(kind) for x in values])
        for values, kind in (
            ([s.token_ids for s in chosen], np.int64),
            ([np.arange(len(s.token_ids)) for s in chosen], np.int64),
            ([np.append(s.token_ids[1:], 0) for s in chosen], np.int64),
            ([np.append(s.loss_mask[1:], 0) for s in chosen], np.float32),
            ([np.append(s.behavior_logprobs[1:], 0) for s in chosen], np.float32),
            ([np.full(len(s.token_ids), s.advantages) for s in chosen], np.float32),
        )
    ]
    tokens, positions, targets, mask, behavior, advantages = (
        torch.from_numpy(c).pin_memory().to(device, non_blocking=True) if device.type == "cuda" else torch.from_numpy(c)
        for c in columns
    )
    rows, options = len(chosen), {}
    if cell.attention == "varlen":
        lengths = [len(s.token_ids) for s in chosen]
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        options = {"packed_ends": ends.to(device), "packed_longest": max(lengths), "position_ids": positions[None]}
        rows = 1
    out = model(input_ids=tokens.view(rows, -1), use_cache=False, **options)
    logits = out.logits.flatten(0, 1).float()
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    ratio = (logprobs - behavior).clamp(-20, 20).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    (-(surrogate * mask).sum() / counted).backward()


def _register_varlen() -> None:
    """torch's varlen_attn as one of transformers' attention functions; plain attention by sequence on CPUs."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from slime_async.learner.megatron.attention import groups_queries, variable_length_attention

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        packed_ends: Tensor,
        packed_longest: int,
        **_: object,
    ) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if query.is_cuda:
            if not groups_queries():
                k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
            return variable_length_attention(q, k, v, packed_ends, packed_longest, scaling)[None], None
        return by_sequence(q, k, v, packed_ends, scaling)[None], None

    AttentionInterface.register("varlen", attend)
    AttentionMaskInterface.register("varlen", lambda *_, **__: None)


def by_sequence(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Causal attention, one call of torch's per sequence: [T, heads, dim]"""
    spans = ends.tolist()
    parts = [
        F.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1)[None] for x in (query, key, value)),
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for start, end in itertools.pairwise(spans)
    ]
    return torch.cat(parts)
