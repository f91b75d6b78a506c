"""The shape of a Hugging Face checkpoint's model, read from its ``config.json``: Llama 3, Qwen2, Qwen3, Qwen3-MoE.

Anything that Megatron's GPTModel would compute otherwise is refused here, so that a model is trained as it was
published or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron's ``rope_scaling`` has built in; only ``factor`` is free"""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts part of a model: every layer has one."""

    count: int
    per_token: int
    hidden_size: int
    normalized: bool
    """Whether the chosen experts' probabilities are normalised to sum to 1"""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, rotary positions, grouped queries and SwiGLU."""

    model_type: str
    layers: int
    hidden_size: int
    heads: int
    groups: int
    """Key/value heads"""
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_factor: float | None
    """Llama 3's rope scaling; None is none"""
    tied: bool
    """Output layer and embedding are one tensor"""
    experts: Experts | None

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type.startswith("qwen3")

    @classmethod
    def read(cls, checkpoint: Path) -> Architecture:
        """Of a checkpoint directory. Raises ``ValueError`` for a model that the learner cannot train faithfully."""
        path = checkpoint / "config.json"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: model.path must be a Hugging Face checkpoint directory")
        return cls.parse(json.loads(path.read_text()))

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Architecture:
        """Of the contents of ``config.json``, as transformers 4 or 5 writes it."""
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type '{model_type}' is not one of {', '.join(MODEL_TYPES)}")
        _refuse_variants(config)
        theta, factor = _rope(config)
        heads = config["num_attention_heads"]
        return cls(
            model_type=model_type,
            layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn_hidden_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=theta,
            rope_factor=factor,
            tied=config.get("tie_word_embeddings", False),
            experts=_experts(config) if model_type == "qwen3_moe" else None,
        )


def _refuse_variants(config: Mapping[str, Any]) -> None:
    unsupported: dict[str, tuple[Any, ...]] = {
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "hidden_act": ("silu",),
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
    }
    for key, accepted in unsupported.items():
        value = config.get(key, accepted[0])
        if value not in accepted:
            raise ValueError(
                f"config.json has {key} = {value!r}, which the learner cannot train (only {accepted[0]!r})"
            )


def _rope(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Base and scaling factor; transformers 5 keeps both in ``rope_parameters``, before it they were apart."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    fixed = {key: scaling.get(key) for key in _LLAMA3_SCALING}
    if kind != "llama3" or fixed != _LLAMA3_SCALING:
        raise ValueError(f"rope scaling {dict(scaling)} is not supported: only llama3's with {_LLAMA3_SCALING}")
    return float(theta), float(scaling["factor"])


def _experts(config: Mapping[str, Any]) -> Experts:
    return Experts(
        count=config.get("num_experts") or config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        hidden_size=config["moe_intermediate_size"],
        normalized=config.get("norm_topk_prob", False),
    )
