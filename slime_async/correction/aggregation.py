"""From token losses to one number, with denominators passed in.

Microbatches and DP ranks are processed apart, so no function here counts what it divides by: the caller passes counts
of the whole batch, and the parts' losses then add up to the batch's. Counts are taken before staleness masking and
before rejection: masking removes gradient, it must not raise the weight of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slime_async.config.algorithm import Aggregation
from slime_async.correction.ratios import Sequences


@dataclass(frozen=True, slots=True)
class Denominators:
    """Counts over the whole batch that one optimizer step sees: all microbatches of all DP ranks."""

    tokens: float
    """Sampled tokens, before any masking"""
    sequences: float
    """Sequences with at least one sampled token"""


def aggregate(
    token_losses: Tensor,
    aggregation: Aggregation,
    denominators: Denominators,
    sequences: Sequences,
    tokens_per_sequence: Tensor,
    horizon_tokens: float | None = None,
) -> Tensor:
    """This part's share of the batch loss, a scalar.

    ``token_losses`` [T] are masked and weighted already; ``tokens_per_sequence`` [S] counts sampled tokens before any
    masking. x_t are the losses, N tokens, M sequences, n_s tokens of sequence s, H the horizon:

    - ``token-mean``: Σ_t x_t / N (DAPO, arXiv 2503.14476)
    - ``seq-mean-token-mean``: Σ_s (Σ_t x_t / n_s) / M (GRPO, arXiv 2402.03300)
    - ``seq-mean-token-sum``: Σ_t x_t / M
    - ``seq-mean-token-sum-norm``: Σ_t x_t / (M·H) (Dr. GRPO, arXiv 2503.20783)

    Nothing sampled gives 0, not NaN.
    """
    if aggregation == "token-mean":
        return token_losses.sum() / (denominators.tokens or 1.0)
    sequence_losses = sequences.sum(token_losses)
    if aggregation == "seq-mean-token-mean":
        sequence_losses = sequence_losses / tokens_per_sequence.masked_fill(tokens_per_sequence == 0, 1.0)
    elif aggregation == "seq-mean-token-sum-norm":
        assert horizon_tokens is not None, "the configuration refuses this"
        sequence_losses = sequence_losses / horizon_tokens
    return sequence_losses.sum() / (denominators.sequences or 1.0)
