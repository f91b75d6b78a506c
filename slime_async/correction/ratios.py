"""Log-ratios that stay finite, and reductions over the sequences of a packed microbatch.

Everything off-policy starts from ``log a − log b`` of two policies' log-probs of the same sampled tokens. The rules for
extremes live here and nowhere else:

===============================  =======================================================================
input                            treated as
===============================  =======================================================================
position outside the mask        log-ratio 0, no gradient, whatever the columns hold there (NaN, −inf)
a = −inf alone                   log-ratio −300, without gradient; the ratio is e^−20
b = −inf alone                   log-ratio +300, without gradient; the ratio is e^20 and any bound catches it
both −inf                        log-ratio 0, without gradient: the policies agree
log-ratio beyond ±20             the ratio is taken at e^±20, without gradient
bfloat16                         computed in float32; float64 stays
NaN inside the mask              stays NaN: a broken forward pass must not pass for a small loss
===============================  =======================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Ratios are taken within e^±20: beyond it only their being extreme matters, and e^20 squared still fits float32."""

LOG_RATIO_LIMIT = 300.0
"""Log-ratios themselves stay within ±this, so that sums over a sequence are never inf − inf; e^300 squared still fits
float64, where the diagnostics take ratios without the bound above."""


def upcast(x: Tensor) -> Tensor:
    """float32, or float64 where the input has it: differences of log-probs lose everything in bfloat16."""
    return x if x.dtype == torch.float64 else x.float()


def log_ratio(numerator: Tensor, denominator: Tensor, mask: Tensor) -> Tensor:
    """log(numerator/denominator) of two policies' log-probs, 0 where ``mask`` is 0; all [T], finite unless NaN."""
    numerator, denominator = upcast(numerator), upcast(denominator)
    undefined = (mask == 0) | (torch.isneginf(numerator) & torch.isneginf(denominator))
    difference = numerator.masked_fill(undefined, 0.0) - denominator.masked_fill(undefined, 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def ratio(log_ratio: Tensor, bound: float = LOG_RATIO_BOUND) -> Tensor:
    """exp of a log-ratio, within e^±``bound``; the gradient is 0 beyond."""
    return log_ratio.clamp(-bound, bound).exp()


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Which sequence each token of a packed microbatch belongs to; reductions over them."""

    ids: Tensor
    """[T] int64, 0 … count − 1"""
    count: int
    """S"""

    def sum(self, values: Tensor) -> Tensor:
        """[T] → [S]"""
        return values.new_zeros(self.count).index_add(0, self.ids, values)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """[T] → [S], over tokens in ``mask``; 0 for a sequence without any."""
        return self.sum(values * mask) / self.sum(mask).clamp(min=1.0)

    def max(self, values: Tensor, mask: Tensor) -> Tensor:
        """[T] → [S], over tokens in ``mask``; 0 for a sequence without any."""
        lowest = values.masked_fill(mask == 0, -torch.inf)
        highest = values.new_full((self.count,), -torch.inf).scatter_reduce(0, self.ids, lowest, "amax")
        return highest.masked_fill(self.sum(mask) == 0, 0.0)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[S] → [T]"""
        return per_sequence[self.ids]
