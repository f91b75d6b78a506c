"""The demo's models: Qwen3 with fresh weights, of 0.43M parameters for CPUs and of 126M for GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from slime_async.demo.tokenizer import EOS, PAD, VOCABULARY, make_tokenizer

EMBEDDING_STD = 0.02
RESIDUAL_GAIN = 0.5
"""Projections that write to the residual stream start smaller, so that it does not grow with depth at first."""


SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 288,
}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 3072,
}


def make_config(shape: Mapping[str, Any] = SMALL) -> Qwen3Config:
    """Qwen3's shape in small: grouped queries, QK-norm, SwiGLU, tied embeddings."""
    return Qwen3Config(
        **shape,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
        dtype="float32",
        architectures=["Qwen3ForCausalLM"],
    )


def make_checkpoint(directory: Path | str, seed: int) -> None:
    """Write config, weights drawn from ``seed`` (fp32) and tokenizer into ``directory``, for ``from_pretrained``."""
    write_checkpoint(Path(directory), seed, make_config(), make_tokenizer())


def make_large_checkpoint(directory: Path | str, seed: int) -> None:
    """The same with 126M parameters."""
    write_checkpoint(Path(directory), seed, make_config(LARGE), make_tokenizer())


def write_checkpoint(directory: Path, seed: int, config: Qwen3Config, tokenizer: PreTrainedTokenizerFast) -> None:
    """The same for any small Qwen3 with tied embeddings."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: _initial(name, shape, generator) for name, shape in _shapes(config)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig.from_dict({"do_sample": True, **ends}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms start at 1, matrices Gaussian with variance 1 / fan-in (less for residual projections)."""
    if len(shape) == 1:
        return torch.ones(shape)
    if "embed_tokens" in name:
        std = EMBEDDING_STD
    else:
        std = (RESIDUAL_GAIN if "o_proj" in name or "down_proj" in name else 1.0) / math.sqrt(shape[1])
    return std * torch.randn(shape, generator=generator)


def _shapes(config: Qwen3Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of ``Qwen3ForCausalLM``'s tensors; building the module itself would take seconds to import."""
    hidden, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    assert config.num_key_value_heads is not None  # set by both configurations, optional in the class
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
