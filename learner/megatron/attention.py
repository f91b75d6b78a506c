"""Causal attention over packed sequences with torch alone: on CPU and GPU, with and without context parallelism.

A packed batch is many sequences end to end. ``varlen_attn`` takes it as it is (GPU, half precision). Elsewhere the
sequences are sorted into a few buckets of similar length, each padded to a dense ``[sequences, heads, length, dim]``
for one call of scaled-dot-product attention; padding stands at the right, where causal attention never looks. The
index tensors of this are made once per microbatch, in ``plan_attention``, and used by all layers.

Context parallelism cuts each sequence into ``2 · cp`` equal chunks, of which rank r holds chunks r and
``2 · cp − 1 − r`` (both ends of the causal triangle, so that work is even). Keys and values are gathered.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from slime_async.learner.megatron.fused import norm_and_rotate

_VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
_SMALLEST_BUCKET = 16
"""Shorter sequences share one bucket: padding them costs less than another call"""


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length as one dense batch: N sequences, Q queries and K keys each."""

    sequences: int
    queries: Tensor
    """[N · Q], rows of the packed queries; padding repeats row 0"""
    keys: Tensor
    """[N · K], rows of the packed keys and values (gathered over context-parallel ranks)"""
    mask: Tensor | None
    """[N, 1, Q, K], True where a query sees a key; None is the plain causal triangle"""


@dataclass(frozen=True)
class AttentionPlan:
    """How a packed batch becomes dense batches, and comes back."""

    buckets: tuple[Bucket, ...]
    restore: Tensor
    """[T], the row of each packed query in the concatenated outputs of the buckets"""


@dataclass
class PackedSequences(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a packed batch, with our plan for it."""

    plan: AttentionPlan | None = None
    cos: Tensor | None = None
    """[P, dim / 2], fp32: of each token's rotary angles; None where Megatron's own attention computes them"""
    sin: Tensor | None = None
    routes: Tensor | None = None
    """[layers, P / sp, k], the experts that an engine recorded"""
    ends: Tensor | None = None
    """``cu_seqlens_q`` on the device, for ``varlen_attn``"""


def local_positions(length: int, cp_rank: int, cp_size: int) -> NDArray[np.int64]:
    """Positions of a sequence that this context-parallel rank holds, in order; ``length`` divides by 2 · cp."""
    if cp_size == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * cp_size, -1)
    return np.concatenate([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def plan_attention(lengths: list[int], cp_rank: int, cp_size: int, device: torch.device) -> AttentionPlan:
    """Sort sequences, given by their whole (padded) lengths in packed order, into buckets of like length."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    members: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        members.setdefault(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), []).append(i)
    restore = np.empty(starts[-1] // cp_size, dtype=np.int64)
    buckets, done = [], 0
    for _, indices in sorted(members.items()):
        queries, keys, mask, rows = _bucket([(starts[i], lengths[i]) for i in indices], starts[-1], cp_rank, cp_size)
        restore[queries[rows]] = done + rows
        done += queries.size
        seen = None if mask is None else torch.from_numpy(mask).to(device)
        buckets.append(
            Bucket(len(indices), torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device), seen)
        )
    return AttentionPlan(tuple(buckets), torch.from_numpy(restore).to(device))


def _bucket(
    spans: list[tuple[int, int]], total: int, cp_rank: int, cp_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_] | None, NDArray[np.int64]]:
    """Query rows [N · Q], key rows [N · K], mask, and which entries of the query rows are not padding."""
    longest = max(length for _, length in spans)
    queries = np.full((len(spans), longest // cp_size), -1, dtype=np.int64)
    keys = np.full((len(spans), longest), -1, dtype=np.int64)
    places = np.zeros_like(queries)
    for i, (start, length) in enumerate(spans):
        local = length // cp_size
        queries[i, :local] = np.arange(local) + start // cp_size
        for rank in range(cp_size):  # gathered keys lie rank by rank
            held = local_positions(length, rank, cp_size)
            keys[i, held] = rank * (total // cp_size) + start // cp_size + np.arange(local)
        places[i, :local] = local_positions(length, cp_rank, cp_size)
    mask = None if cp_size == 1 else (np.arange(longest) <= places[:, :, None])[:, None]
    rows = np.flatnonzero(queries >= 0)
    return queries.clip(0).ravel(), keys.clip(0).ravel(), mask, rows


class TorchAttention(MegatronModule):  # type: ignore[misc]
    """Megatron's core attention (queries, keys and values in, context out) for packed batches."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self._cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, heads, dim], key and value [T, groups, dim] of this rank → [T, heads · dim]."""
        packed = packed_seq_params
        assert packed is not None, "the learner trains on packed batches only"
        if packed.plan is None:
            out = self._variable_length(query, key, value, packed)
        else:
            if self._cp_group is not None:
                key = gather_from_sequence_parallel_region(key.contiguous(), group=self._cp_group)
                value = gather_from_sequence_parallel_region(value.contiguous(), group=self._cp_group)
            dense = [self._dense(query, key, value, bucket) for bucket in packed.plan.buckets]
            out = torch.cat(dense).index_select(0, packed.plan.restore)
        return out.reshape(query.size(0), -1)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
        """[N · Q, heads, dim]"""
        q, k, v = (
            x.index_select(0, rows).view(bucket.sequences, -1, *x.shape[1:]).transpose(1, 2)
            for x, rows in ((query, bucket.queries), (key, bucket.keys), (value, bucket.keys))
        )
        out = F.scaled_dot_product_attention(
            q, k, v, bucket.mask, is_causal=bucket.mask is None, scale=self._scale, enable_gqa=q.size(1) != k.size(1)
        )
        return out.transpose(1, 2).flatten(0, 1)

    def _variable_length(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        if query.size(1) != key.size(1) and not groups_queries():
            key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
        assert packed.ends is not None
        return variable_length_attention(query, key, value, packed.ends, packed.max_seqlen_q, self._scale)


class PackedSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self-attention for packed batches: norms of queries and keys and RoPE are one fused function."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *_: object,
        packed_seq_params: PackedSequences | None = None,
        **__: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[P / sp, 1, hidden] → the same, and the projection's bias."""
        packed = packed_seq_params
        assert packed is not None, "the learner trains on packed batches only"
        assert packed.cos is not None, "made with the microbatch"
        assert packed.sin is not None
        mixed, _bias = self.linear_qkv(hidden_states)
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = self.num_attention_heads_per_partition // groups
        query, key, value = mixed.view(mixed.size(0), groups, heads + 2, dim).split([heads, 1, 1], 2)
        query, key = norm_and_rotate(
            query,
            key,
            getattr(self.q_layernorm, "weight", None),
            getattr(self.k_layernorm, "weight", None),
            packed.cos,
            packed.sin,
            self.config.layernorm_epsilon,
        )
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        context = attend(query, key, value[:, :, 0], attention_mask, packed_seq_params=packed)
        return cast("tuple[Tensor, Tensor | None]", self.linear_proj(context[:, None]))


def variable_length_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float
) -> Tensor:
    """Causal attention within each sequence: [T, heads, dim], by the flash kernels that torch brings along."""
    options: dict[str, Any] = {"scale": scale}
    options |= {"is_causal": True} if "is_causal" in _VARLEN_OPTIONS else {"window_size": (-1, 0)}
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = query.size(1) != key.size(1)
    out = varlen_attn(query, key, value, ends, ends, longest, longest, **options)
    assert isinstance(out, Tensor), "only asked for the output"
    return out


@cache
def groups_queries() -> bool:
    """Whether ``varlen_attn`` takes fewer key than query heads.

    Its kernels do; where a release has no ``enable_gqa`` a small case says whether it lets them.
    """
    if "enable_gqa" in _VARLEN_OPTIONS:
        return True
    q, k = (torch.randn(8, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (2, 1))
    ends = torch.tensor([0, 8], device="cuda", dtype=torch.int32)
    try:
        with torch.enable_grad():
            grouped = variable_length_attention(q, k, k, ends, 8, 0.125)
            twice = k.repeat_interleave(2, 1)
            repeated = variable_length_attention(q, twice, twice, ends, 8, 0.125)
            slope, wanted = (torch.autograd.grad(out.float().sum(), k)[0] for out in (grouped, repeated))
    except (RuntimeError, ValueError):
        return False
    return torch.allclose(grouped, repeated, atol=1e-2) and torch.allclose(slope, wanted, atol=5e-2)


def has_varlen_kernel(dtype: torch.dtype, cp_size: int) -> bool:
    """Whether ``varlen_attn`` serves this device and dtype; it knows no context parallelism."""
    return torch.cuda.is_available() and dtype != torch.float32 and cp_size == 1
