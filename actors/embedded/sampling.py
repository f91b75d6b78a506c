"""Sampling by inverse CDF from counter-based uniforms: token ``i`` depends on (logits, seed, i) and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n] numbers in [0, 1), one per (seed, position): splitmix64 (Steele et al., OOPSLA 2014) over both."""
    with np.errstate(over="ignore"):
        stream = _mix(seeds + _GOLDEN)
        bits = _mix(stream + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    scaled: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return scaled


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def sample(logits: Tensor, uniform: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row of ``logits`` [n, V] and its log-probability, both [n].

    ``uniform``, ``temperature`` (0: greedy), ``top_p`` and ``top_k`` (≤ 0: off) are [n]. The log-probability is after
    temperature (at temperature 1 for greedy rows) and before top-p and top-k, as SGLang reports it.
    """
    greedy = temperature <= 0
    logprobs = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    probs = logprobs.exp()
    if bool((top_p < 1).any() | (top_k > 0).any()):
        probs = _truncate(probs, top_p, top_k)
    cdf = probs.double().cumsum(-1)
    # u < 1, but rounding may leave the sum below it: scale, and never pass the last token that has probability
    last = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    tokens = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(-1).minimum(last)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _truncate(probs: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Zero what lies outside the k most probable tokens and outside the smallest set with mass ≥ p."""
    vocab = probs.shape[-1]
    ranked, order = probs.sort(-1, descending=True)
    k = torch.where(top_k > 0, top_k, vocab)[:, None]
    ranked = ranked.masked_fill(torch.arange(vocab, device=probs.device) >= k, 0)
    before = ranked.cumsum(-1) - ranked
    within = before < top_p[:, None] * ranked.sum(-1, keepdim=True)
    keep = within | (top_p >= 1)[:, None]  # rounding must not cost such a row its tail
    return torch.zeros_like(probs).scatter(-1, order, ranked * keep)
