"""Hugging Face checkpoints of dense decoders: their shape, and their tensors.

Read: Qwen3, Qwen2 / Qwen2.5 and Llama (2, 3, 3.1 …), tied or untied head, RoPE plain or with Llama 3 scaling.
Refused, with the field that says so: other architectures, mixtures of experts, sliding windows, other RoPE scalings,
quantised weights, biases on the output or MLP projections, other activations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

MODEL_TYPES = ("qwen3", "qwen2", "llama")


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretch of long wavelengths (``rope_type = "llama3"``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a dense decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    max_position_embeddings: int
    tied_head: bool
    qkv_bias: bool
    qk_norm: bool

    def inverse_frequencies(self) -> Tensor:
        """[head_dim / 2], fp32: radians per position."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        frequencies = 1.0 / (self.rope_theta**exponents)
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        # turns within the original context, mapped to 0 (slow: stretched) … 1 (fast: kept)
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def read_config(directory: Path) -> DecoderConfig:
    """The shape in ``directory/config.json``. Raises ``ValueError`` naming the field that is not supported."""
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the embedded engine needs a Hugging Face checkpoint directory")
    raw: dict[str, Any] = json.loads(path.read_text())
    _refuse_unsupported(raw, path)
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling
    rope = raw.get("rope_parameters") or {**(raw.get("rope_scaling") or {}), "rope_theta": raw.get("rope_theta", 10000)}
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", 10000)),
        rope_scaling=_read_rope_scaling(rope, path),
        max_position_embeddings=raw["max_position_embeddings"],
        tied_head=raw.get("tie_word_embeddings", False),
        qkv_bias=raw["model_type"] == "qwen2",  # whatever its config says
        qk_norm=raw["model_type"] == "qwen3",
    )


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``model.safetensors`` or of the shards in its index, one at a time, by checkpoint name."""
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (no mapping: it has keys() but no iteration)
                yield name, shard.get_tensor(name)


def read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as shard:
            shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
    return shapes


def weight_files(directory: Path) -> list[Path]:
    """``model.safetensors``, or the shards in its index. Raises ``ValueError`` for one that is not there."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for path in (paths := [directory / name for name in names]):
        if not path.is_file():
            raise ValueError(f"{path} does not exist: only safetensors checkpoints are read")
    return paths


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    """Whatever would make this decoder compute something else than the model's own code."""
    refused = {
        "model_type": raw.get("model_type") not in MODEL_TYPES,
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "use_sliding_window": raw.get("use_sliding_window", False),
        "layer_types": any(kind != "full_attention" for kind in raw.get("layer_types") or ()),
        "quantization_config": raw.get("quantization_config") is not None,
        "mlp_bias": raw.get("mlp_bias", False),
        # on Qwen3 and Llama it also puts a bias on the output projection
        "attention_bias": raw.get("attention_bias", False) and raw.get("model_type") != "qwen2",
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for field, is_refused in refused.items():
        if is_refused:
            raise ValueError(
                f"{path}: {field} = {raw.get(field)!r} is not supported by the embedded engine, which runs dense "
                f"{', '.join(MODEL_TYPES)} decoders with full attention; use engine = 'sglang' for this model"
            )


def _read_rope_scaling(rope: dict[str, Any], path: Path) -> Llama3Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{path}: rope_type = {kind!r} is not supported by the embedded engine (default, llama3); "
            "use engine = 'sglang' for this model"
        )
    return Llama3Scaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )
