"""The critic's part of a training step: advantages and targets before it, the value loss in it, and what they show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime_async.config.schema import CriticConfig
from slime_async.correction.critic import gae, value_loss
from slime_async.learner.sequences import Columns, TrainSequence, policy_batch
from slime_async.learner.transfer import to_device

STD_EPSILON = 1e-6


def with_estimates(
    config: CriticConfig, sequences: Sequence[TrainSequence], values: Columns
) -> tuple[list[TrainSequence], dict[str, float]]:
    """The sequences with advantages and value targets by GAE, from the critic's ``values`` before the batch.

    On the host, from the whole batch: the same on every rank. An episode ends with its last sampled token.
    """
    batch = policy_batch(sequences, None, None, torch.device("cpu"))
    old = torch.from_numpy(np.concatenate([v[1:] for v in values])).double()
    rewards = torch.from_numpy(np.concatenate([_given(s.rewards)[1:] for s in sequences])).double()
    mask = batch.loss_mask.double()
    estimate = gae(rewards, old, mask, batch.sequences, config.gamma, config.gae_lambda)
    counted = mask > 0
    metrics = _explained(estimate.value_targets[counted], old[counted])
    advantages = _normalised(estimate.advantages, counted) if config.normalize else estimate.advantages
    cuts = np.cumsum([len(s.token_ids) - 1 for s in sequences])[:-1]
    split = [
        [np.concatenate([[0], part]).astype(np.float32) for part in np.split(column.numpy(), cuts)]
        for column in (advantages, estimate.value_targets)
    ]
    return [
        dataclasses.replace(s, advantages=a, values=v, value_targets=t)
        for s, a, v, t in zip(sequences, split[0], values, split[1], strict=True)
    ], metrics


def critic_loss(
    config: CriticConfig, values: Tensor, sequences: Sequence[TrainSequence], denominator: float
) -> tuple[Tensor, Tensor]:
    """A microbatch's share of the weighted value loss, and the sums [loss, clipped tokens] that ``shown`` divides.

    ``values`` [Σ (T − 1)] have the gradient; stale tokens are left out, but not of ``denominator``, the batch's tokens.
    """
    device = values.device
    mask, fresh, old, targets = (
        to_device(np.concatenate([np.zeros(0), *(column[1:] for column in columns)]), device, torch.float32)
        for columns in (
            [s.loss_mask for s in sequences],
            [s.weight_mask for s in sequences],
            [_given(s.values) for s in sequences],
            [_given(s.value_targets) for s in sequences],
        )
    )
    result = value_loss(values, old, targets, config.clip)
    sums = torch.stack([(result.loss * mask * fresh).sum(), (result.clipped * mask * fresh).sum()])
    return config.loss_coef * sums[0] / max(denominator, 1.0), sums.detach().double()


def shown(sums: Tensor, tokens: float) -> dict[str, float]:
    """The sums of all microbatches and ranks, over the batch's ``tokens``."""
    loss, clipped = (sums / max(tokens, 1.0)).tolist()
    return {"critic/loss": loss, "critic/clip_fraction": clipped}


def _given(column: NDArray[np.float32] | None) -> NDArray[np.float32]:
    assert column is not None, "a batch for a critic has rewards, and values before it is trained"
    return column


def _normalised(advantages: Tensor, counted: Tensor) -> Tensor:
    sampled = advantages[counted]
    if len(sampled) < 2:
        return advantages
    return ((advantages - sampled.mean()) / (sampled.std() + STD_EPSILON)).masked_fill(~counted, 0.0)


def _explained(targets: Tensor, values: Tensor) -> dict[str, float]:
    """Of sampled tokens. The explained variance is 1 for a perfect critic, 0 for one that says the mean."""
    if len(targets) < 2 or float(targets.var()) == 0.0:
        return {"critic/value_mean": float(values.mean()) if len(values) else 0.0}
    explained = 1.0 - float((targets - values).var()) / float(targets.var())
    return {"critic/value_mean": float(values.mean()), "critic/explained_variance": explained}
