"""The policy loss of one microbatch: the only entry point that the learner calls.

::

    μ, π_prox ──► weight (detached) ──┐
        └───────► rejection mask ─────┤
    π_θ, π_prox ► objective ──────────┴─► aggregate / explicit denominators ─► loss
                                          + kl_coef · KL(π_θ ‖ π_ref) − entropy_coef · H
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction import objectives
from slime_async.correction.aggregation import Denominators, aggregate
from slime_async.correction.batch import BatchStatistics, PolicyBatch
from slime_async.correction.diagnostics import MetricSums, TokenDiagnostics, measure
from slime_async.correction.kl import reference_kl
from slime_async.correction.masks import rejection_mask
from slime_async.correction.prox import prox_logprobs
from slime_async.correction.ratios import Sequences, log_ratio, upcast
from slime_async.correction.weights import importance_weight, level_log_ratio


class PolicyLoss(NamedTuple):
    """One microbatch's share of the batch loss, and its metrics as sums."""

    loss: Tensor
    """Scalar with gradient, already over the global denominator: shares of all microbatches and DP ranks add up"""
    sums: MetricSums
    """Merge over microbatches, all-reduce over DP ranks, then ``finalise()``"""


def policy_loss(
    config: AlgorithmConfig,
    current_logprobs: Tensor,
    entropy: Tensor | None,
    batch: PolicyBatch,
    denominators: Denominators,
    statistics: BatchStatistics | None = None,
) -> PolicyLoss:
    """The configured loss of a microbatch.

    ``current_logprobs`` [T] are log π_θ with gradient; ``entropy`` [T] is needed when ``entropy_coef`` > 0;
    ``statistics`` when ``config.needs_batch_statistics``. A microbatch with nothing to train gives a loss of 0 with
    zero gradient, so that every rank can take part in the backward pass. Raises ``ValueError`` when a column that the
    configuration needs is missing.
    """
    _refuse_missing(config, entropy, batch, statistics)
    statistics = statistics or BatchStatistics()
    mask, advantages, sequences = upcast(batch.loss_mask), upcast(batch.advantages), batch.sequences
    advantages = advantages.masked_fill(mask == 0, 0.0)
    prox = prox_logprobs(config, current_logprobs, batch)
    log_prox_over_behavior = log_ratio(prox, batch.behavior_logprobs, mask)
    log_current_over_prox = log_ratio(current_logprobs, prox, mask)

    weight = importance_weight(config, log_prox_over_behavior, mask, sequences)
    if config.weight_normalize and statistics.weight_mean:
        weight = weight / statistics.weight_mean
    kept = rejection_mask(
        config,
        log_prox_over_behavior,
        log_ratio(batch.behavior_logprobs, current_logprobs.detach(), mask),
        advantages,
        mask,
        sequences,
        statistics.second_moment_cutoff,
    )
    objective = token_objective(config, log_current_over_prox, current_logprobs, advantages, mask, sequences)

    fresh = mask * upcast(batch.weight_mask)
    token_losses = objective.loss * weight * kept * fresh
    kl = None
    if config.kl_coef > 0:
        assert batch.ref_logprobs is not None
        kl = reference_kl(config.kl_form, current_logprobs, batch.ref_logprobs, batch.behavior_logprobs, mask)
        token_losses = token_losses + config.kl_coef * kl * fresh
    if config.entropy_coef > 0:
        assert entropy is not None
        token_losses = token_losses - config.entropy_coef * upcast(entropy).masked_fill(fresh == 0, 0.0) * fresh
    loss = aggregate(
        token_losses, config.aggregation, denominators, sequences, sequences.sum(mask), config.horizon_tokens
    )
    diagnostics = TokenDiagnostics(
        mask=mask,
        staleness=batch.staleness,
        log_prox_over_behavior=log_prox_over_behavior,
        weighted_log_ratio=level_log_ratio(log_prox_over_behavior, mask, sequences, config.weight_level),
        weight=weight,
        log_current_over_prox=log_current_over_prox.detach(),
        fresh=fresh,
        kept=kept,
        clipped=objective.clipped,
        dual_clipped=objective.dual_clipped,
        advantages=advantages,
        kl=None if kl is None else kl.detach(),
        entropy=None if entropy is None else entropy.detach(),
    )
    return PolicyLoss(loss, measure(config, diagnostics, sequences))


def token_objective(
    config: AlgorithmConfig,
    log_current_over_prox: Tensor,
    current_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sequences: Sequences,
) -> objectives.TokenLoss:
    """The configured objective's loss of each token [T]; 0 outside ``mask``."""
    current = current_logprobs.masked_fill(mask == 0, 0.0)
    low, high = config.clip_low, config.clip_high
    if config.objective == "cispo":
        return objectives.cispo(log_current_over_prox, current, advantages, low, high)
    if config.objective == "reinforce":
        return objectives.reinforce(current, advantages)
    if config.objective == "topr":
        return objectives.topr(log_current_over_prox, current, advantages, mask, sequences)
    if config.objective == "gspo":
        log_current_over_prox = objectives.sequence_log_ratio(log_current_over_prox, mask, sequences)
    elif config.objective == "gspo-token":
        log_current_over_prox = objectives.sequence_log_ratio_per_token(log_current_over_prox, mask, sequences)
    return objectives.ppo_clip(log_current_over_prox, advantages, low, high, config.dual_clip)


def _refuse_missing(
    config: AlgorithmConfig, entropy: Tensor | None, batch: PolicyBatch, statistics: BatchStatistics | None
) -> None:
    if config.kl_coef > 0 and batch.ref_logprobs is None:
        raise ValueError(f"kl_coef = {config.kl_coef} needs ref_logprobs, but the batch has none: set kl_coef = 0")
    if config.entropy_coef > 0 and entropy is None:
        raise ValueError(f"entropy_coef = {config.entropy_coef} needs the entropy column, but it is None")
    if config.needs_batch_statistics and (statistics is None or batch.prox_logprobs is None):
        raise ValueError(
            "weight_normalize and second_moment need prox_logprobs and statistics of the whole batch: recompute π_prox "
            "and pass batch_statistics(config, all microbatches)"
        )
