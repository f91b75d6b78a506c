"""π_prox: the policy that the clip is centred on.

=============  ==================================  ==================================================================
source         π_prox is                           cost and error
=============  ==================================  ==================================================================
recompute      the learner before the update       one forward pass; none when the batch has one optimizer step
bypass         μ                                   free; the clip then also cuts what staleness and engine changed
interpolate    between μ and π_θ by staleness      free; approximate, see ``interpolated_logprobs``
=============  ==================================  ==================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction.batch import PolicyBatch
from slime_async.correction.ratios import log_ratio, upcast


def interpolated_logprobs(
    current_logprobs: Tensor, behavior_logprobs: Tensor, staleness: Tensor, mask: Tensor
) -> Tensor:
    """log μ + α·(log π_θ − log μ), α = d/(d + 1) for a token d versions old; [T], without gradient.

    μ is version v − d, π_prox is v and π_θ is on its way to v + 1: a straight line in log-probability through the first
    and the last passes the middle at α. A fresh token has π_prox = μ. Source: AReaL, ``prox_logp_method = loglinear``.
    It pays where a batch has several optimizer steps; with one, π_prox is π_θ itself.
    """
    with torch.no_grad():
        behavior = upcast(behavior_logprobs)
        age = staleness.clamp(min=0).to(behavior.dtype)
        step = log_ratio(current_logprobs, behavior_logprobs, mask)
        return behavior + age / (age + 1.0) * step


def prox_logprobs(config: AlgorithmConfig, current_logprobs: Tensor, batch: PolicyBatch) -> Tensor:
    """log π_prox of each token [T], as configured, without gradient."""
    if config.prox == "bypass":
        return upcast(batch.behavior_logprobs)
    if config.prox == "interpolate":
        return interpolated_logprobs(current_logprobs, batch.behavior_logprobs, batch.staleness, batch.loss_mask)
    return upcast(current_logprobs.detach() if batch.prox_logprobs is None else batch.prox_logprobs.detach())
