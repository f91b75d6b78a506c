"""Rejection masks: 1 where a token stays in the loss, 0 where it is rejected; never with gradient.

Statistics are of ``prox_over_behavior`` r = π_prox/μ, with log r within ±20: k1 = log r, k2 = (log r)²/2,
k3 = r − 1 − log r. Bounds on k1 are given as ratios and keep ``lower ≤ r ≤ upper``. (verl's ``token_k1`` tests −log r,
so its "0.1_1.2" keeps ratios in [0.83, 10], not in [0.1, 1.2].) Rejected tokens stay in the denominators.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slime_async.config.algorithm import AlgorithmConfig, Rejection, Statistic
from slime_async.correction.ratios import LOG_RATIO_BOUND, Sequences


def divergence(log_prox_over_behavior: Tensor, statistic: Statistic) -> Tensor:
    """k1, k2 or k3 of each token, [T]. Source: http://joschu.net/blog/kl-approx.html."""
    log_r = log_prox_over_behavior.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if statistic == "k1":
        return log_r
    if statistic == "k2":
        return log_r.square() / 2
    return log_r.exp() - 1.0 - log_r


def divergence_mask(
    log_prox_over_behavior: Tensor,
    mask: Tensor,
    sequences: Sequences,
    rejection: Rejection,
    statistic: Statistic,
    lower: float = 0.0,
    upper: float | None = None,
) -> Tensor:
    """Keeps tokens, or whole sequences, whose statistic is within bounds, [T]. Source: verl, ``rollout_rs``.

    The mean of k1 with ratio bounds is rejection by the geometric mean. A sequence without sampled tokens is kept. No
    preset rejects; verl's examples take 0.5 … 2 for tokens and 1 ± 0.001 for geometric means, which average noise away.
    """
    value = divergence(log_prox_over_behavior, statistic)
    if rejection == "sequence-sum":
        value = sequences.spread(sequences.sum(value * mask))
    elif rejection == "sequence-mean":
        value = sequences.spread(sequences.mean(value, mask))
    elif rejection == "sequence-max":
        value = sequences.spread(sequences.max(value, mask))
    lowest, highest = -math.inf, math.inf if upper is None else upper
    if statistic == "k1":
        lowest = math.log(lower) if lower > 0 else -math.inf
        highest = math.inf if upper is None else math.log(upper)
    return ((value >= lowest) & (value <= highest)).to(value.dtype)


def veto_mask(log_prox_over_behavior: Tensor, mask: Tensor, sequences: Sequences, threshold: float) -> Tensor:
    """Rejects sequences with any token whose π_prox/μ is below ``threshold``, [T]; off unless set, 1e-4 is common.

    Source: slime, ``rs_veto_threshold``; verl, ``rollout_token_veto_threshold``.
    """
    catastrophic = (log_prox_over_behavior < math.log(threshold)) & (mask > 0)
    return 1.0 - sequences.spread(sequences.max(catastrophic.to(mask.dtype), mask))


def off_policy_sequence_mask(
    log_old_over_current: Tensor, advantages: Tensor, mask: Tensor, sequences: Sequences, delta: float
) -> Tensor:
    """OPSM: rejects tokens with A < 0 in sequences whose mean log(π_old/π_θ) exceeds ``delta``, [T].

    A sequence that the policy has moved away from, and that went badly, has nothing left to teach. Off unless
    ``delta`` is set. Source: DeepSeek-V3.2 (arXiv 2512.02556), where π_old is the sampler, so that the engine's
    mismatch counts, too.
    """
    drifted = sequences.spread(sequences.mean(log_old_over_current, mask)) > delta
    return 1.0 - (drifted & (advantages < 0)).to(mask.dtype)


def second_moment_cutoff(squared_log_ratios: Tensor, bound: float) -> float:
    """M2PO: the largest c such that the mean of the values ≤ c is at most ``bound``; −1 when no value qualifies.

    ``squared_log_ratios`` [N] are (log π_prox/μ)² of a whole batch's sampled tokens. Source: arXiv 2510.01161,
    ``bound`` 0.04 there. Equal values share one fate, so the result does not depend on their order.
    """
    if squared_log_ratios.numel() == 0:
        return math.inf
    ascending = squared_log_ratios.double().sort().values
    count = torch.arange(1, len(ascending) + 1, dtype=torch.float64, device=ascending.device)
    last_of_equals = torch.ones_like(ascending, dtype=torch.bool)
    last_of_equals[:-1] = ascending[:-1] < ascending[1:]
    qualifies = (ascending.cumsum(0) / count <= bound) & last_of_equals
    return float(ascending[qualifies][-1]) if bool(qualifies.any()) else -1.0


def second_moment_mask(log_prox_over_behavior: Tensor, cutoff: float) -> Tensor:
    """M2PO: rejects tokens with (log π_prox/μ)² above ``cutoff``, [T]."""
    return (log_prox_over_behavior.square() <= cutoff).to(log_prox_over_behavior.dtype)


def rejection_mask(
    config: AlgorithmConfig,
    log_prox_over_behavior: Tensor,
    log_behavior_over_current: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sequences: Sequences,
    cutoff: float | None = None,
) -> Tensor:
    """All configured rejections together, [T]; ``cutoff`` is the batch's, for ``second_moment``."""
    with torch.no_grad():
        kept = torch.ones_like(mask)
        if config.reject != "none":
            kept = kept * divergence_mask(
                log_prox_over_behavior,
                mask,
                sequences,
                config.reject,
                config.reject_statistic,
                config.reject_lower,
                config.reject_upper,
            )
        if config.veto is not None:
            kept = kept * veto_mask(log_prox_over_behavior, mask, sequences, config.veto)
        if config.opsm_delta is not None:
            kept = kept * off_policy_sequence_mask(
                log_behavior_over_current, advantages, mask, sequences, config.opsm_delta
            )
        if config.second_moment is not None:
            assert cutoff is not None, "policy_loss refuses this"
            kept = kept * second_moment_mask(log_prox_over_behavior, cutoff)
        return kept
