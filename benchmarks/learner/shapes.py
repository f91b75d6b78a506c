"""Model shapes, the work that a token costs, and the batch that every cell trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PEAK_FLOPS = 989e12
"""Dense bf16, H100 SXM and H200, by the vendor's data sheet"""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 model's."""

    layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    groups: int
    head_dim: int = 128
    vocab_size: int = 151_936

    @property
    def parameters(self) -> int:
        """All of them; embedding and output matrix are one."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.groups) + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.layers * layer + self.hidden_size

    def flops(self, lengths: NDArray[np.int64]) -> float:
        """Forward and backward over sequences of these lengths, nothing counted twice where it is recomputed.

        6 per parameter and token, and for causal attention 6 · layers · heads · head_dim · s per token of a sequence of
        s tokens: scores and weighted values are 4 · heads · head_dim per pair of tokens forward and twice that
        backward, and half the pairs are masked.
        """
        tokens, squares = float(lengths.sum()), float((lengths**2).sum())
        return 6.0 * self.parameters * tokens + 6.0 * self.layers * self.heads * self.head_dim * squares

    def config(self) -> dict[str, Any]:
        """``config.json``"""
        return {
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        }

    def write(self, directory: Path) -> Path:
        """A checkpoint directory without weights."""
        (directory / "config.json").write_text(json.dumps(self.config()))
        return directory


SHAPES = {
    "4b": Shape(36, 2560, 9728, 32, 8),
    "1.7b": Shape(28, 2048, 6144, 16, 8),
    "0.6b": Shape(28, 1024, 3072, 16, 8),
    "tiny": Shape(2, 64, 96, 4, 2, head_dim=16, vocab_size=512),
}


def batch_lengths(tokens: int, sequence: int) -> NDArray[np.int64]:
    """Of the sequences of one step: all ``sequence`` tokens, or where that is 0 from 1k to 8k (1/64 to 1/8 of the
    step), the last one cut to make ``tokens``."""
    if sequence:
        return np.full(tokens // sequence, sequence)
    drawn = np.random.default_rng(0).integers(tokens // 64, tokens // 8 + 1, 64)
    ends = drawn.cumsum().clip(max=tokens)
    lengths = np.diff(ends, prepend=0)
    return lengths[lengths > 0]
