"""Packed microbatches: many sequences end to end in one row, as Megatron's THD format wants them.

``logits[i]`` predicts the token at ``i + 1``, so a sequence of T tokens yields T − 1 log-probabilities; *columns* are
these of all sequences in order, [Σ (T − 1)]. With context parallelism every rank holds a part of each sequence, and the
columns are put together from all parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from slime_async.learner.megatron.attention import PackedSequences, local_positions, plan_attention
from slime_async.learner.megatron.layers import has_transformer_engine
from slime_async.learner.megatron.logprob import token_logprobs
from slime_async.learner.megatron.model import LearnerModel
from slime_async.learner.megatron.replay import pack_routes
from slime_async.learner.transfer import to_device


@dataclass(frozen=True)
class Microbatch:
    """What this rank feeds to the model, and how to read columns off what comes out. P is the local packed length."""

    indices: tuple[int, ...]
    """Of the sequences, in the batch they came from"""
    tokens: Tensor
    """[1, P]"""
    positions: Tensor
    """[1, P]"""
    targets: Tensor
    """[P], the token after each"""
    columns: Tensor
    """[Σ (T − 1)], rows of the packed log-probs that are columns (gathered over context-parallel ranks)"""
    packed: PackedSequences


def make_microbatch(
    model: LearnerModel,
    indices: Sequence[int],
    sequences: Sequence[NDArray[np.int32]],
    routes: Sequence[NDArray[np.int16] | None] = (),
) -> Microbatch:
    """Pack ``sequences`` (token ids, at least 1 each), padded as the layout needs it; none gives pure padding.

    ``routes`` are their recorded experts [T, layers, k], where a model of experts is to follow them.
    """
    cp_size, cp_rank = model.layout.context, parallel_state.get_context_parallel_rank()
    lengths = [_round_up(len(tokens), model.alignment) for tokens in sequences]
    if rest := -sum(lengths) % (model.alignment * model.layout.tensor) or (0 if lengths else model.alignment):
        lengths.append(_round_up(rest, model.alignment * (model.layout.tensor if not lengths else 1)))
    total = sum(lengths)
    whole, targets = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for start, tokens in zip(starts, sequences, strict=False):
        whole[start : start + len(tokens)] = tokens
        targets[start : start + len(tokens) - 1] = tokens[1:]
    positions = [local_positions(n, cp_rank, cp_size) for n in lengths]
    mine = np.concatenate([start + p for start, p in zip(starts, positions, strict=False)])
    columns = _columns(starts, lengths, [len(tokens) for tokens in sequences], cp_size)
    device = model.device
    packed = _packed_sequences(model, lengths, np.concatenate(positions))
    recorded = pack_routes(list(routes), lengths, mine, model.config.sequence_parallel)
    packed.routes = None if recorded is None else to_device(recorded, device)
    return Microbatch(
        indices=tuple(indices),
        tokens=to_device(whole[mine], device)[None],
        positions=to_device(np.concatenate(positions), device)[None],
        targets=to_device(targets[mine], device),
        columns=to_device(columns, device),
        packed=packed,
    )


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _columns(starts: NDArray[np.int64], lengths: list[int], real_lengths: list[int], cp_size: int) -> NDArray[np.int64]:
    """Where each column lies among the log-probs of all context-parallel ranks, one rank after the other."""
    if cp_size == 1:
        place = np.arange(starts[-1])
    else:
        place = np.empty(starts[-1], dtype=np.int64)
        held = [
            np.concatenate([s + local_positions(n, rank, cp_size) for s, n in zip(starts, lengths, strict=False)])
            for rank in range(cp_size)
        ]
        place[np.concatenate(held)] = np.arange(starts[-1])
    parts = [place[s : s + n - 1] for s, n in zip(starts, real_lengths, strict=False)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _packed_sequences(model: LearnerModel, lengths: list[int], positions: NDArray[np.int64]) -> PackedSequences:
    """Ends of sequences stay on the CPU unless TransformerEngine reads them: Megatron's RoPE asks for their values."""
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    on_device = to_device(ends.numpy(), model.device)
    plan, cos, sin = None, None, None
    if model.dense_attention:
        plan = plan_attention(lengths, parallel_state.get_context_parallel_rank(), model.layout.context, model.device)
    if not has_transformer_engine():
        angles = to_device(positions, model.device)[:, None] * model.rotary_frequencies
        cos, sin = angles.cos(), angles.sin()
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=on_device if has_transformer_engine() else ends,
        cu_seqlens_kv=on_device if has_transformer_engine() else ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        plan=plan,
        cos=cos,
        sin=sin,
        ends=on_device,
    )


def column_logprobs(
    model: LearnerModel, microbatch: Microbatch, hidden: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """fp32 log-probabilities (and entropies) of a microbatch's columns, with gradient, whole on every rank.

    ``hidden`` [P / sp, 1, h] is what the last pipeline stage's decoder gave.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    elif group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    logprobs, entropies = token_logprobs(
        hidden[:, 0],
        model.output_weight,
        microbatch.targets,
        temperature=temperature,
        vocab_size=model.architecture.vocab_size,
        group=group,
        entropy=entropy,
        keep_logits=model.keep_logits and torch.is_grad_enabled(),
    )
    return _whole_columns(microbatch, logprobs), None if entropies is None else _whole_columns(microbatch, entropies)


def column_values(model: LearnerModel, microbatch: Microbatch, hidden: Tensor) -> Tensor:
    """The critic's values [Σ (T − 1)] of the states in which the columns' tokens were chosen, with gradient."""
    values = model.value_head(hidden)
    if model.config.sequence_parallel:
        group = parallel_state.get_tensor_model_parallel_group()
        values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=group)
    return _whole_columns(microbatch, values)


def _whole_columns(microbatch: Microbatch, local: Tensor) -> Tensor:
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        local = _GatherColumns.apply(local, group)  # type: ignore[no-untyped-call]
    return local.index_select(0, microbatch.columns)


class _GatherColumns(torch.autograd.Function):
    """[P] of this rank → [cp · P] of all. Each rank then computes the same loss, and keeps its own part's gradient:
    DDP adds up the parts over context-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None
