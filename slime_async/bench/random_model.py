"""Checkpoints of well-known shapes with random weights: speed depends on a model's shape, not on what it has learnt.

For ``model.path``, as ``slime_async.bench.random_model:qwen3_0_6b``.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from slime_async.demo.tokenizer import EOS, PAD, VOCABULARY, make_tokenizer

POSITIONS = 8192
STD = 0.02
BLOCK = 1 << 22
"""Weights repeat after so many: drawing billions takes longer than a benchmark"""


def qwen3_0_6b(directory: Path | str, seed: int) -> None:
    """0.6B parameters, embeddings tied."""
    _write(Path(directory), seed, hidden=1024, ffn=3072, layers=28, heads=16, tied=True)


def qwen3_4b(directory: Path | str, seed: int) -> None:
    """4.0B parameters, embeddings tied."""
    _write(Path(directory), seed, hidden=2560, ffn=9728, layers=36, heads=32, tied=True)


def qwen3_14b(directory: Path | str, seed: int) -> None:
    """14.8B parameters."""
    _write(Path(directory), seed, hidden=5120, ffn=17408, layers=40, heads=40, tied=False)


def _write(directory: Path, seed: int, *, hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> None:
    """Config, bf16 weights and a tokenizer of a few characters, in ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    block = (STD * torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed))).to(torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        shapes.pop("lm_head.weight", None)
    weights = {name: _tensor(shape, block, index * 9973) for index, (name, shape) in enumerate(shapes.items())}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig.from_dict({"do_sample": True, **ends}).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def _tensor(shape: tuple[int, ...], block: torch.Tensor, start: int) -> torch.Tensor:
    """Norms are 1; everything else repeats the block, from another place each."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = math.prod(shape)
    return block.roll(start % BLOCK).repeat(-(-count // BLOCK))[:count].reshape(shape).clone()
