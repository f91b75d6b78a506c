"""Tiny checkpoints with random weights, of every architecture that the learner trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
"""An odd vocabulary, so that splitting it needs padding"""
WIDE: dict[str, Any] = SHAPE | {"hidden_size": 64, "initializer_range": 0.2}
"""For models whose heads have the hidden size's share: triton's attention kernels want 16 dimensions at least"""

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "qwen3-deep": lambda: Qwen3Config(**SHAPE | {"num_hidden_layers": 6}, head_dim=16, tie_word_embeddings=True),
    "qwen3-untied": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**WIDE, tie_word_embeddings=True),
    "llama3": lambda: LlamaConfig(
        **WIDE | {"max_position_embeddings": 16384}, tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
    ),
}


def write_checkpoint(directory: Path, architecture: str, seed: int = 0) -> Path:
    """Random weights; norms and biases too, so that no part of a conversion can hide behind ones and zeros."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.0 if name.endswith("bias") else 0.5))
    model.save_pretrained(directory)
    return directory
