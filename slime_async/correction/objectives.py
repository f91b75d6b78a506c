"""Objectives on ``current_over_prox`` = π_θ/π_prox: one pure function each, giving the loss of every token.

Losses are to be minimised. They carry no weight, no mask and no denominator; those are applied in ``loss.py``. A is the
advantage, r = π_θ/π_prox of the token, sg(·) stops the gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slime_async.correction.ratios import Sequences, ratio, upcast

LOGPROB_FLOOR = -100.0
"""log π enters a loss no lower than this (e^−100 is below float32's smallest number), without gradient beyond."""


class TokenLoss(NamedTuple):
    """The loss of each token, and which tokens lost their gradient to a bound; all [T]."""

    loss: Tensor
    clipped: Tensor
    """bool: the clip was active"""
    dual_clipped: Tensor
    """bool: the dual clip was active"""


def _bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    return 0.0 if clip_low is None else 1.0 - clip_low, math.inf if clip_high is None else 1.0 + clip_high


def ppo_clip(
    log_current_over_prox: Tensor,
    advantages: Tensor,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
) -> TokenLoss:
    """−min(r·A, clip(r, 1 − low, 1 + high)·A); with the dual clip c, at most −c·A where A < 0.

    Sources: arXiv 1707.06347; asymmetric bounds arXiv 2503.14476 (DAPO: 0.2, 0.28); dual clip arXiv 1912.09729 (c = 3).
    A bound of None is no bound; with neither the loss is −r·A.
    """
    r = ratio(log_current_over_prox)
    lower, upper = _bounds(clip_low, clip_high)
    unclipped_loss = -r * advantages
    clipped_loss = -r.clamp(lower, upper) * advantages
    loss = torch.maximum(unclipped_loss, clipped_loss)
    clipped = clipped_loss > unclipped_loss
    if dual_clip is None:
        return TokenLoss(loss, clipped, torch.zeros_like(clipped))
    ceiling = -dual_clip * advantages
    dual_clipped = (advantages < 0) & (loss > ceiling)
    return TokenLoss(torch.where(advantages < 0, torch.minimum(loss, ceiling), loss), clipped, dual_clipped)


def sequence_log_ratio(log_current_over_prox: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """GSPO's log s: the mean log-ratio of the token's sequence [T]; every token of it carries the gradient.

    Source: arXiv 2507.18071, eq. 7; defaults there clip 3e-4 below and 4e-4 above.
    """
    return sequences.spread(sequences.mean(log_current_over_prox, mask))


def sequence_log_ratio_per_token(log_current_over_prox: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """GSPO-token's log s_t = sg(log s) + log π_θ − sg(log π_θ): the sequence's value, the token's own gradient [T].

    Source: arXiv 2507.18071, eq. 14; what verl's ``gspo`` computes. Differs from GSPO only where tokens of one
    sequence have different advantages, weights or masks.
    """
    own = log_current_over_prox - log_current_over_prox.detach()
    return sequence_log_ratio(log_current_over_prox, mask, sequences).detach() + own


def cispo(
    log_current_over_prox: Tensor,
    current_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float | None = 1.0,
    clip_high: float | None = 0.28,
) -> TokenLoss:
    """−sg(clip(r, 1 − low, 1 + high))·A·log π_θ: no token loses its gradient. Source: arXiv 2506.13585 (MiniMax-M1)."""
    r = ratio(log_current_over_prox.detach())
    lower, upper = _bounds(clip_low, clip_high)
    bounded = r.clamp(lower, upper)
    loss = -bounded * advantages * floored(current_logprobs)
    return TokenLoss(loss, bounded != r, torch.zeros_like(r, dtype=torch.bool))


def reinforce(current_logprobs: Tensor, advantages: Tensor) -> TokenLoss:
    """−A·log π_θ; off-policy it relies on the weight alone. Source: Williams, 1992."""
    loss = -advantages * floored(current_logprobs)
    nothing = torch.zeros_like(loss, dtype=torch.bool)
    return TokenLoss(loss, nothing, nothing)


def topr(
    log_current_over_prox: Tensor, current_logprobs: Tensor, advantages: Tensor, mask: Tensor, sequences: Sequences
) -> TokenLoss:
    """−A·log π_θ where A ≥ 0, −sg(min(ρ, 1))·A·log π_θ where A < 0; ρ is the trajectory's π_θ/π_prox (product).

    Tapered off-policy REINFORCE, arXiv 2503.14286, with π_prox = μ: what went well is imitated at full weight however
    unlikely it has become, what went badly is pushed down only as far as the policy would still do it.
    """
    log_trajectory = sequences.spread(sequences.sum(log_current_over_prox.detach() * mask))
    taper = ratio(log_trajectory).clamp(max=1.0)
    coefficient = torch.where(advantages < 0, taper, 1.0)
    loss = -coefficient * advantages * floored(current_logprobs)
    tapered = (advantages < 0) & (log_trajectory > 0)
    return TokenLoss(loss, tapered, torch.zeros_like(tapered))


def floored(logprobs: Tensor) -> Tensor:
    """log π at least ``LOGPROB_FLOOR``, so that an impossible token gives a finite loss."""
    return upcast(logprobs).clamp(min=LOGPROB_FLOOR)
