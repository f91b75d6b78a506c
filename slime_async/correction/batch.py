"""What the loss reads: the columns of one packed microbatch, and numbers that only the whole batch can give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction.masks import second_moment_cutoff
from slime_async.correction.ratios import Sequences, log_ratio, upcast
from slime_async.correction.weights import importance_weight


@dataclass(frozen=True, slots=True, eq=False)
class PolicyBatch:
    """Columns of one packed microbatch, no padding; all [T].

    A sequence must be whole: with context parallelism gather the columns over its ranks first. Positions where
    ``loss_mask`` is 0 may hold anything.
    """

    sequence_ids: Tensor
    """int64, 0 … num_sequences − 1: which sequence each token belongs to"""
    num_sequences: int
    """S"""
    loss_mask: Tensor
    """1 where the policy sampled the token, before staleness masking: what denominators count"""
    weight_mask: Tensor
    """0 where the token is masked as stale, else 1"""
    behavior_logprobs: Tensor
    """log μ, as the sampler reported it"""
    advantages: Tensor
    staleness: Tensor
    """int, learner version − the token's version"""
    prox_logprobs: Tensor | None = None
    """log π_prox where it was recomputed; None stands for the current policy, which it is at the only optimizer step
    of a batch. Not read when prox is ``bypass`` or ``interpolate``."""
    ref_logprobs: Tensor | None = None
    """log π_ref; needed when ``kl_coef`` > 0"""

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.sequence_ids, self.num_sequences)


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Statistics of π_prox/μ over the whole batch; a microbatch alone would get others, and so another loss."""

    weight_mean: float | None = None
    """Mean weight, over tokens or (sequence and geometric level) over sequences; set when ``weight_normalize``"""
    second_moment_cutoff: float | None = None
    """Tokens with (log π_prox/μ)² above this are rejected; set when ``second_moment``"""


def batch_statistics(
    config: AlgorithmConfig,
    batches: Sequence[PolicyBatch],
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> BatchStatistics:
    """The statistics of all microbatches together; call once π_prox is recomputed, before the first optimizer step.

    ``gather`` concatenates a 1-D float tensor over the DP ranks; every rank must call. Raises ``ValueError`` when a
    microbatch lacks π_prox.
    """
    weights, moments = [], []
    for batch in batches:
        if batch.prox_logprobs is None:
            raise ValueError("batch statistics need prox_logprobs of every microbatch: recompute π_prox first")
        mask = upcast(batch.loss_mask)
        log_prox_over_behavior = log_ratio(batch.prox_logprobs, batch.behavior_logprobs, mask)
        sampled = mask > 0
        moments.append(log_prox_over_behavior[sampled].square())
        weight = importance_weight(config, log_prox_over_behavior, mask, batch.sequences)
        if config.weight_level == "token":
            weights.append(weight[sampled])
        else:
            counted = batch.sequences.sum(mask) > 0
            weights.append(batch.sequences.mean(weight, mask)[counted])
    return BatchStatistics(
        weight_mean=_mean(gather(torch.cat(weights))) if config.weight_normalize else None,
        second_moment_cutoff=None
        if config.second_moment is None
        else second_moment_cutoff(gather(torch.cat(moments)), config.second_moment),
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 1.0
