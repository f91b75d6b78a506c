"""A dense decoder with fused projections and a KV cache of fixed slots, in plain torch.

A request owns one slot, a row of the cache. *Prefill* runs whole prompts of equal length; *decode* runs one token for
each of the first ``n`` slots, as views of the cache: nothing is gathered, and unused rows among them cost their share
of a matrix product and no more. A straggler far behind is moved to the front by the scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_async.actors.embedded.checkpoint import DecoderConfig

HEAD = "lm_head.weight"
QK_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
"""[D] in a checkpoint; kept once per head, so that queries and keys are normalised together"""


@dataclass(frozen=True, slots=True)
class _Layer:
    """H hidden, D head size, Q query and K key heads, I intermediate size."""

    input_norm: Tensor
    """[H]"""
    qkv: Tensor
    """[(Q + 2K)·D, H]"""
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """[Q + K, D]: the queries' weight once per query head, then the keys'"""
    out: Tensor
    """[H, Q·D]"""
    post_norm: Tensor
    gate_up: Tensor
    """[2·I, H]"""
    down: Tensor
    """[H, I]"""


class Decoder:
    """The model and its cache. One thread at a time; call under ``torch.inference_mode``."""

    def __init__(
        self, config: DecoderConfig, *, slots: int, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.max_context = max_context
        c = config

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        qkv_rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self._embedding = empty(c.vocab_size, c.hidden_size)
        self._head = self._embedding if c.tied_head else empty(c.vocab_size, c.hidden_size)
        self._norm = empty(c.hidden_size)
        self._layers = [
            _Layer(
                input_norm=empty(c.hidden_size),
                qkv=empty(qkv_rows, c.hidden_size),
                qkv_bias=empty(qkv_rows) if c.qkv_bias else None,
                qk_norm=empty(c.num_heads + c.num_kv_heads, c.head_dim) if c.qk_norm else None,
                out=empty(c.hidden_size, c.num_heads * c.head_dim),
                post_norm=empty(c.hidden_size),
                gate_up=empty(2 * c.intermediate_size, c.hidden_size),
                down=empty(c.hidden_size, c.intermediate_size),
            )
            for _ in range(c.num_layers)
        ]
        self._targets = dict(self._named_targets())
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), c.inverse_frequencies())
        self._cos = torch.cat((angles.cos(), angles.cos()), -1).to(device, dtype)
        self._sin = torch.cat((-angles.sin(), angles.sin()), -1).to(device, dtype)
        self._cache = empty(c.num_layers, slots, 2 * c.num_kv_heads, max_context, c.head_dim)
        """Key heads, then value heads"""
        self._rows = torch.arange(slots, device=device)
        self._columns = torch.arange(max_context, device=device)

    # ------------------------------------------------------------------------------------------------- weights

    def check_shapes(self, given: Mapping[str, Sequence[int]]) -> None:
        """Raises ``ValueError`` for Hugging Face tensors, by name and shape, that are missing, unknown or misshapen."""
        for name, shape in given.items():
            if name == HEAD and self.config.tied_head:
                continue  # some checkpoints store the tied matrix twice
            target = self._targets.get(name)
            if target is None:
                raise ValueError(f"tensor {name!r} is none of this model's: {sorted(self._targets)[:3]} …")
            wanted = tuple(target.shape[-1:] if name.endswith(QK_NORMS) else target.shape)
            if wanted != tuple(shape):
                raise ValueError(f"tensor {name!r} has shape {tuple(shape)}, this model's {wanted}")
        if missing := sorted(self._targets.keys() - given.keys()):
            raise ValueError(f"{len(missing)} tensors are missing, {missing[0]!r} among them")

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy Hugging Face tensors into place: all of them, or none.

        Raises ``ValueError`` as ``check_shapes``; the weights before are still whole then.
        """
        given = dict(tensors)
        self.check_shapes({name: tensor.shape for name, tensor in given.items()})
        for name, target in self._targets.items():
            target.copy_(given[name])

    def _named_targets(self) -> Iterable[tuple[str, Tensor]]:
        c = self.config
        yield "model.embed_tokens.weight", self._embedding
        yield "model.norm.weight", self._norm
        if not c.tied_head:
            yield "lm_head.weight", self._head
        split = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim]
        for i, layer in enumerate(self._layers):
            prefix = f"model.layers.{i}."
            yield prefix + "input_layernorm.weight", layer.input_norm
            yield prefix + "post_attention_layernorm.weight", layer.post_norm
            yield prefix + "self_attn.o_proj.weight", layer.out
            yield prefix + "mlp.down_proj.weight", layer.down
            for part, rows in zip("qkv", torch.split(layer.qkv, split), strict=True):
                yield prefix + f"self_attn.{part}_proj.weight", rows
            if layer.qkv_bias is not None:
                for part, rows in zip("qkv", torch.split(layer.qkv_bias, split), strict=True):
                    yield prefix + f"self_attn.{part}_proj.bias", rows
            if layer.qk_norm is not None:
                for suffix, rows in zip(
                    QK_NORMS, torch.split(layer.qk_norm, [c.num_heads, c.num_kv_heads]), strict=True
                ):
                    yield prefix + suffix, rows
            for part, rows in zip(("gate", "up"), layer.gate_up.chunk(2), strict=True):
                yield prefix + f"mlp.{part}_proj.weight", rows

    # ------------------------------------------------------------------------------------------------- compute

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` cached positions of slot ``source`` into slot ``target``."""
        self._cache[:, target, :, :length] = self._cache[:, source, :, :length]

    def prefill(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Fill the cache of ``slots`` [b] with the prompts ``ids`` [b, t]; logits [b, V] of the token after each."""
        b, t = ids.shape
        heads, head_dim = self.config.num_heads, self.config.head_dim
        last = torch.arange(1, b + 1, device=self.device) * t - 1
        cos, sin = (table[:t].repeat(b, 1)[:, None] for table in (self._cos, self._sin))
        x = F.embedding(ids.view(-1), self._embedding)
        for i, layer in enumerate(self._layers):
            qkv = self._project(layer, x, cos, sin).view(b, t, -1, head_dim).transpose(1, 2)
            self._cache[i][slots, :, :t] = qkv[:, heads:]
            keys, values = qkv[:, heads:].chunk(2, 1)
            queries = qkv[:, :heads]
            is_last = i == len(self._layers) - 1
            if is_last:  # nothing reads the other positions' outputs
                queries, x = queries[:, :, -1:], x[last]
            y = F.scaled_dot_product_attention(queries, keys, values, is_causal=not is_last, enable_gqa=True)
            x = self._finish(layer, x, y.transpose(1, 2).reshape(len(x), -1))
        return self._logits(x)

    def decode(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """One token for each of the first n slots: ``ids`` at ``positions`` < ``longest``, both [n]; logits [n, V]."""
        n, c = len(ids), self.config
        rows = self._rows[:n]
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        hidden = self._columns[:longest] > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._cos.dtype, device=self.device).masked_fill_(hidden, -math.inf)
        x = F.embedding(ids, self._embedding)
        for i, layer in enumerate(self._layers):
            qkv = self._project(layer, x, cos, sin)
            cache = self._cache[i, :n]
            cache[rows, :, positions] = qkv[:, c.num_heads :]
            keys, values = cache[:, :, :longest].chunk(2, 1)
            # queries that share a key head stand where a sequence would: no key is repeated
            queries = qkv[:, : c.num_heads].reshape(n, c.num_kv_heads, -1, c.head_dim)
            y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
            x = self._finish(layer, x, y.reshape(n, -1))
        return self._logits(x)

    def _project(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [m, H], cos and sin [m, 1, D] → [m, Q + 2K, D]: queries and keys, normalised and rotated, then values."""
        c = self.config
        qkv = F.linear(self._rms(x, layer.input_norm), layer.qkv, layer.qkv_bias).view(len(x), -1, c.head_dim)
        turned = qkv[:, : c.num_heads + c.num_kv_heads]
        source: Tensor = turned
        if layer.qk_norm is not None:
            source = F.rms_norm(turned, (c.head_dim,), None, c.rms_norm_eps) * layer.qk_norm
        # rotary embedding in the half-split layout of Hugging Face checkpoints; the sign is in the table
        turned.copy_((source * cos).addcmul_(source.roll(c.head_dim // 2, -1), sin))
        return qkv

    def _finish(self, layer: _Layer, x: Tensor, y: Tensor) -> Tensor:
        """Attention's output ``y`` [m, Q·D] and the MLP onto the residual stream ``x`` [m, H]."""
        x = torch.addmm(x, y, layer.out.t())
        gate, up = F.linear(self._rms(x, layer.post_norm), layer.gate_up).chunk(2, -1)
        return torch.addmm(x, F.silu(gate).mul_(up), layer.down.t())

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._rms(x, self._norm), self._head).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)
