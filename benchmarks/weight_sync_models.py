"""Models of a given shape with random weights, for benchmarks that move weights and do not look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from slime_async.config import Config

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "qwen3-14b": {
        "vocab_size": 151_936,
        "hidden_size": 5120,
        "intermediate_size": 17_408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
POSITIONS = 8192
SUPPORTED_GPU_ARGUMENTS = {
    "dtype": "bfloat16",
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_prefill_cuda_graph": True,
    "max_running_requests": 128,
    "mem_fraction_static": 0.6,
    "stream_interval": 16,
}
"""Kernels that come with torch and triton alone; room for a second copy of the weights; answers in pieces of 16 tokens,
as SGLang since 0.5.20 sends them by default here"""
LAYERS_IN_30B_A3B = 48


def layers_30b_a3b(layers: int) -> list[int]:
    """Bytes of each tensor in so many layers of Qwen3-30B-A3B, and of its embedding and output, in bf16."""
    hidden, expert, head = 2048, 768, 128
    attention = [32 * head * hidden, 4 * head * hidden, 4 * head * hidden, 32 * head * hidden, head, head]
    layer = [*attention, hidden, hidden, 128 * hidden, *[hidden * expert] * (3 * 128)]
    return [2 * size for size in [151_936 * hidden, *layer * layers, hidden, 151_936 * hidden]]


def write_config(directory: Path, shape: str, device: str) -> Qwen3Config:
    """All that a server needs which starts with random weights."""
    config = Qwen3Config(
        **SHAPES[shape],
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16" if device == "cuda" else "float32",
    )
    config.save_pretrained(directory)
    return config


def weight_sizes(config: Qwen3Config) -> list[int]:
    """Bytes of each tensor, in the type that the configuration names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return [parameter.numel() * parameter.element_size() for parameter in model.parameters()]


def write_random_weights(directory: Path, config: Qwen3Config, device: str) -> None:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.save_pretrained(directory)


def make_config(checkpoint: Path, shape: str) -> Config:
    """The least that a trainer needs."""
    dtype = "float32" if shape == "tiny" else "bfloat16"
    return Config.model_validate({"model": {"path": str(checkpoint), "dtype": dtype}})
