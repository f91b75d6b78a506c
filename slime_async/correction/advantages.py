"""Advantages: from rewards of groups, or from a critic's values.

Group estimators take ``rewards`` [groups, n] of the whole batch: baselines use every reward, also those of
trajectories that are masked later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction.ratios import upcast

STD_EPSILON = 1e-6
"""Added to a standard deviation: a group that agrees has advantage 0, not 0/0."""


def group_advantages(config: AlgorithmConfig, rewards: Tensor) -> Tensor:
    """The configured advantage of each trajectory, [groups, n] → [groups, n], to be spread over its tokens.

    Raises ``ValueError`` for rewards that are not finite, and for groups too small for the estimator.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: one row per group, [groups, n]")
    if not bool(torch.isfinite(rewards).all()):
        broken = rewards[~torch.isfinite(rewards)][0].item()
        raise ValueError(f"a reward is {broken}: rewards must be finite; return a number from the verifier")
    if config.advantage == "gae":
        raise ValueError("advantage = 'gae' comes from a critic's values: see correction.critic.gae")
    if rewards.shape[1] < 2 and config.advantage in ("grpo", "grpo-no-std", "rloo", "reinforce++-baseline"):
        raise ValueError(
            f"advantage = '{config.advantage}' compares within groups, but a group has {rewards.shape[1]} trajectory: "
            "set batch.group_size ≥ 2 or advantage = 'reinforce++'"
        )
    rewards = upcast(rewards)
    if config.advantage == "grpo":
        return grpo(rewards)
    if config.advantage == "grpo-no-std":
        return grpo_without_std(rewards)
    if config.advantage == "rloo":
        return leave_one_out(rewards)
    if config.advantage == "reinforce++":
        return reinforce_plus_plus(rewards)
    return reinforce_plus_plus(grpo_without_std(rewards))


def grpo(rewards: Tensor) -> Tensor:
    """(R − mean) / (std + ε) within each group, std with n − 1. Source: arXiv 2402.03300 (DeepSeekMath)."""
    return grpo_without_std(rewards) / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)


def grpo_without_std(rewards: Tensor) -> Tensor:
    """R − mean of the group: easy and hard tasks are not scaled up. Source: arXiv 2503.20783 (Dr. GRPO)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def leave_one_out(rewards: Tensor) -> Tensor:
    """R − mean of the group's others: n/(n − 1) times Dr. GRPO's, unbiased. Source: arXiv 2402.14740 (RLOO)."""
    n = rewards.shape[1]
    return grpo_without_std(rewards) * (n / (n - 1))


def reinforce_plus_plus(rewards: Tensor) -> Tensor:
    """(R − mean) / (std + ε) over the whole batch. Source: arXiv 2501.03262 (REINFORCE++).

    On rewards less their group's mean it is REINFORCE++-baseline.
    """
    if rewards.numel() < 2:
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + STD_EPSILON)
