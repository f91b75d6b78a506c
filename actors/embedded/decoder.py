"""A dense decoder with fused projections and a KV cache of fixed slots, in plain torch.

A request owns one slot, a row of the cache. *Prefill* runs whole prompts of equal length; *decode* runs one token for
each of the first ``n`` slots, as views of the cache: nothing is gathered, and unused rows among them cost their share
of a matrix product and no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slime_async.actors.embedded.checkpoint import DecoderConfig


@dataclass(frozen=True, slots=True)
class _Layer:
    """H hidden, D head size, Q query and K key heads, I intermediate size."""

    input_norm: Tensor
    """[H]"""
    qkv: Tensor
    """[(Q + 2K)·D, H]"""
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    """[D]"""
    k_norm: Tensor | None
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
                q_norm=empty(c.head_dim) if c.qk_norm else None,
                k_norm=empty(c.head_dim) if c.qk_norm else None,
                out=empty(c.hidden_size, c.num_heads * c.head_dim),
                post_norm=empty(c.hidden_size),
                gate_up=empty(2 * c.intermediate_size, c.hidden_size),
                down=empty(c.hidden_size, c.intermediate_size),
            )
            for _ in range(c.num_layers)
        ]
        self._targets = dict(self._named_targets())
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), c.inverse_frequencies())
        self._cos = torch.cat((angles, angles), -1).cos().to(device, dtype)
        self._sin = torch.cat((angles, angles), -1).sin().to(device, dtype)
        cache = (c.num_layers, slots, c.num_kv_heads, max_context, c.head_dim)
        self._keys, self._values = empty(*cache), empty(*cache)
        self._rows = torch.arange(slots, device=device)
        self._columns = torch.arange(max_context, device=device)

    # ------------------------------------------------------------------------------------------------- weights

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy Hugging Face tensors into place: all of them, or none.

        Raises ``ValueError`` for missing, unknown and misshapen ones; the weights before are still whole then.
        """
        given = dict(tensors)
        if self.config.tied_head:
            given.pop("lm_head.weight", None)  # some checkpoints store the tied matrix twice
        for name, tensor in given.items():
            target = self._targets.get(name)
            if target is None:
                raise ValueError(f"tensor {name!r} is none of this model's: {sorted(self._targets)[:3]} …")
            if target.shape != tensor.shape:
                raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, this model's {tuple(target.shape)}")
        if missing := sorted(self._targets.keys() - given.keys()):
            raise ValueError(f"{len(missing)} tensors are missing, {missing[0]!r} among them")
        for name, tensor in given.items():
            self._targets[name].copy_(tensor)

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
            if layer.q_norm is not None and layer.k_norm is not None:
                yield prefix + "self_attn.q_norm.weight", layer.q_norm
                yield prefix + "self_attn.k_norm.weight", layer.k_norm
            for part, rows in zip(("gate", "up"), layer.gate_up.chunk(2), strict=True):
                yield prefix + f"mlp.{part}_proj.weight", rows

    # ------------------------------------------------------------------------------------------------- compute

    def prefill(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Fill the cache of ``slots`` [b] with the prompts ``ids`` [b, t]; logits [b, V] of the token after each."""
        t = ids.shape[1]
        cos, sin = self._cos[:t], self._sin[:t]
        x = F.embedding(ids, self._embedding)
        for i, layer in enumerate(self._layers):
            q, k, v = self._project(layer, x, cos, sin)
            self._keys[i][slots, :, :t] = k
            self._values[i][slots, :, :t] = v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1, enable_gqa=q.shape[1] != k.shape[1])
            x = self._finish(layer, x, y)
        return self._logits(x[:, -1])

    def decode(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """One token for each of the first n slots: ``ids`` at ``positions`` < ``longest``, both [n]; logits [n, V]."""
        n = ids.shape[0]
        cos, sin = self._cos[positions][:, None, None], self._sin[positions][:, None, None]
        visible = (self._columns[:longest] <= positions[:, None])[:, None, None]
        x = F.embedding(ids, self._embedding)[:, None]
        for i, layer in enumerate(self._layers):
            q, k, v = self._project(layer, x, cos, sin)
            keys, values = self._keys[i, :n], self._values[i, :n]
            keys[self._rows[:n], :, positions] = k[:, :, 0]
            values[self._rows[:n], :, positions] = v[:, :, 0]
            y = F.scaled_dot_product_attention(
                q, keys[:, :, :longest], values[:, :, :longest], attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1]
            )
            x = self._finish(layer, x, y)
        return self._logits(x[:, 0])

    def _project(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [b, t, H] → queries [b, Q, t, D], keys and values [b, K, t, D], rotated."""
        c = self.config
        b, t, _ = x.shape
        fused = F.linear(self._rms(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        heads = fused.view(b, t, -1, c.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms(q, layer.q_norm), self._rms(k, layer.k_norm)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _finish(self, layer: _Layer, x: Tensor, y: Tensor) -> Tensor:
        """Attention's output [b, Q, t, D] and the MLP onto the residual stream."""
        x = x + F.linear(y.transpose(1, 2).flatten(2), layer.out)
        gate, up = F.linear(self._rms(x, layer.post_norm), layer.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer.down)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._rms(x, self._norm), self._head).float()

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face checkpoints."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin
