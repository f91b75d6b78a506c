"""Detached importance weights from ``prox_over_behavior`` = π_prox/μ.

One family covers the published weights: a *level* that says whose ratio it is, bounds, and what happens outside them.

================  =========  ==========================  ===========================================================
name              level      outside the bounds          source
================  =========  ==========================  ===========================================================
TIS               token      truncated at the upper      https://fengyao.notion.site/off-policy-rl, verl
sequence TIS      sequence   truncated at the upper      verl ``rollout_is = sequence``
geometric TIS     geometric  truncated at the upper      slime ``tis_level = geometric``
decoupled PPO     token      dropped above the cap       arXiv 2505.24298 (AReaL, ``behav_imp_weight_cap``)
IcePop            token      dropped outside the band    arXiv 2510.18855
MIS               sequence   dropped above the cap       https://richardli.xyz/rl-collapse, slime ``tis_mode = mask``
================  =========  ==========================  ===========================================================

Dropped tokens keep their place in the denominators. Weights never carry gradient: they change the measure, not the
objective.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slime_async.config.algorithm import AlgorithmConfig, Level
from slime_async.correction.ratios import Sequences, ratio


def level_log_ratio(log_prox_over_behavior: Tensor, mask: Tensor, sequences: Sequences, level: Level) -> Tensor:
    """[T] → [T]: the token's log-ratio, its sequence's sum of them, or their mean (log of the geometric mean)."""
    if level == "token":
        return log_prox_over_behavior
    if level == "sequence":
        return sequences.spread(sequences.sum(log_prox_over_behavior * mask))
    return sequences.spread(sequences.mean(log_prox_over_behavior, mask))


def truncated_weight(prox_over_behavior: Tensor, lower: float = 0.0, upper: float = math.inf) -> Tensor:
    """min(max(r, lower), upper), r = π_prox/μ: a token's vote is bounded, not taken. The TIS presets have upper = 2.

    Source: https://fengyao.notion.site/off-policy-rl; with a lower bound it is slime's ``clip`` mode.
    """
    return prox_over_behavior.clamp(lower, upper)


def dropped_weight(prox_over_behavior: Tensor, lower: float = 0.0, upper: float = math.inf) -> Tensor:
    """r · 1[lower ≤ r ≤ upper], r = π_prox/μ: what is too far off has no vote.

    Sources: decoupled PPO's cap, arXiv 2505.24298 (upper = 5); IcePop, arXiv 2510.18855 ([0.5, 5]); MIS,
    https://richardli.xyz/rl-collapse (upper = 2, of sequences).
    """
    kept = (prox_over_behavior >= lower) & (prox_over_behavior <= upper)
    return torch.where(kept, prox_over_behavior, 0.0)


def importance_weight(
    config: AlgorithmConfig, log_prox_over_behavior: Tensor, mask: Tensor, sequences: Sequences
) -> Tensor:
    """The configured weight of each token [T], 0 outside ``mask``, before normalisation, without gradient."""
    if config.weight == "none":
        return mask
    with torch.no_grad():
        r = ratio(level_log_ratio(log_prox_over_behavior, mask, sequences, config.weight_level))
        upper = math.inf if config.weight_upper is None else config.weight_upper
        shape = truncated_weight if config.weight == "truncate" else dropped_weight
        return shape(r, config.weight_lower, upper) * mask
