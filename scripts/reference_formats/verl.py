"""verl's rollout correction and policy losses.

verl divides most masked means by the count plus 1e-8. Denominators are arguments here, so the runners pass just that.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from reference_formats.inputs import Inputs, to_float32
from slime_async.correction import masks, objectives
from slime_async.correction.aggregation import Denominators, aggregate
from slime_async.correction.ratios import LOG_RATIO_LIMIT, log_ratio, ratio
from slime_async.correction.weights import dropped_weight, level_log_ratio, truncated_weight

COUNT_EPSILON = 1e-8
GSPO_LOG_RATIO_BOUND = 10.0
REJECTIONS = {"token": "token", "seq_sum": "sequence-sum", "seq_mean": "sequence-mean", "seq_max": "sequence-max"}


def _mean(values: Tensor, inputs: Inputs) -> float:
    """Over sampled tokens."""
    return float((values.double() * inputs.mask).sum() / (inputs.mask.sum() + COUNT_EPSILON))


def _sequence_means(values: Tensor, inputs: Inputs) -> Tensor:
    return inputs.sequences.sum(values * inputs.mask) / (inputs.tokens_per_sequence + COUNT_EPSILON)


def _float32_mean(condition: Tensor) -> float:
    """verl averages sequence-level conditions in float32."""
    return to_float32(condition.float().mean().item())


def _bounds(threshold: float | str) -> tuple[float | None, float]:
    """A number truncates above; "lower_upper" drops outside."""
    parts = [float(part) for part in str(threshold).split("_")]
    return (None, parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def _weights(log_over_behavior: Tensor, inputs: Inputs, level: str, threshold: float | str, normalize: bool) -> Tensor:
    lower, upper = _bounds(threshold)
    raw = ratio(level_log_ratio(log_over_behavior, inputs.mask, inputs.sequences, level))
    weight = truncated_weight(raw, upper=upper) if lower is None else dropped_weight(raw, lower, upper)
    weight = weight * inputs.mask
    return weight / _mean_weight(weight, inputs, level) if normalize else weight


def _mean_weight(weight: Tensor, inputs: Inputs, level: str) -> float:
    if level == "token":
        return _mean(weight, inputs)
    present = inputs.tokens_per_sequence > 0
    return float(_sequence_means(weight, inputs)[present].mean())


def importance_weights(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    level, threshold, normalize = case["rollout_is"], case["threshold"], case.get("batch_normalize", False)
    log_prox_over_behavior = log_ratio(inputs.prox, inputs.behavior, inputs.mask)
    weight = _weights(log_prox_over_behavior, inputs, level, threshold, normalize)
    at_level = level_log_ratio(log_prox_over_behavior, inputs.mask, inputs.sequences, level)
    metrics = _weight_metrics(at_level, inputs, level, threshold)
    if normalize:
        unnormalized = _weights(log_prox_over_behavior, inputs, level, threshold, False)
        metrics["rollout_is_batch_norm_factor"] = _mean_weight(unnormalized, inputs, level)
    return {"weights": inputs.unpacked(weight), "metrics": metrics}


def _weight_metrics(at_level: Tensor, inputs: Inputs, level: str, threshold: float | str) -> dict[str, float]:
    """Of the ratios before truncation; spread and ESS of ratios clamped to the bounds, as verl has them."""
    lower, upper = _bounds(threshold)
    lower = 1.0 / upper if lower is None else lower
    r, sampled = ratio(at_level), inputs.mask > 0
    clamped = truncated_weight(r, lower, upper)
    mean, mean_square = _mean(clamped, inputs), _mean(clamped.square(), inputs)
    per_sequence = _sequence_means(r, inputs)
    metrics = {
        "rollout_is_mean": _mean(r, inputs),
        "rollout_is_ratio_fraction_high": _mean(r > upper, inputs),
        "rollout_is_ratio_fraction_low": _mean(r < lower, inputs),
        "rollout_is_max": r[sampled].max().item(),
        "rollout_is_min": r[sampled].min().item(),
        "rollout_is_std": math.sqrt(max(mean_square - mean**2, 0.0)) if inputs.mask.sum() > 1 else 0.0,
        "rollout_is_eff_sample_size": (mean + COUNT_EPSILON) ** 2 / mean_square,
        "rollout_is_seq_mean": per_sequence.mean().item(),
        "rollout_is_seq_std": per_sequence.std().item() if len(per_sequence) > 1 else 0.0,
        "rollout_is_seq_max": per_sequence.max().item(),
        "rollout_is_seq_min": per_sequence.min().item(),
        "rollout_is_seq_max_deviation": (per_sequence - 1.0).abs().max().item(),
        "rollout_is_seq_fraction_high": _float32_mean(per_sequence > upper),
        "rollout_is_seq_fraction_low": _float32_mean(per_sequence < lower),
    }
    if level == "sequence":
        first = torch.tensor([0, *inputs.lengths[:-1]]).cumsum(0)
        whole = at_level[first]
        metrics["rollout_is_ratio_fraction_high"] = _float32_mean(whole > math.log(upper))
        metrics["rollout_is_ratio_fraction_low"] = _float32_mean(whole < math.log(lower))
        metrics["rollout_is_max"] = ratio(whole.max()).item()
        metrics["rollout_is_min"] = whole.min().exp().item()
    return metrics


def rejection(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    """Options are ANDed. verl tests k1 = −log r, so its [lower, upper] keeps ratios in [1/upper, 1/lower]."""
    options = [option.strip() for option in case["rollout_rs"].split(",")]
    thresholds = [part.strip() for part in str(case["threshold"]).split(",")]
    thresholds = thresholds * len(options) if len(thresholds) == 1 else thresholds
    log_prox_over_behavior = log_ratio(inputs.prox, inputs.behavior, inputs.mask)
    kept = torch.ones_like(inputs.mask)
    for option, threshold in zip(options, thresholds, strict=True):
        where, _, statistic = option.rpartition("_")
        lower, upper = 0.0, float(threshold.rpartition("_")[2])
        if statistic == "k1":
            verl_lower = float(threshold.partition("_")[0]) if "_" in threshold else 1.0 / upper
            lower, upper = 1.0 / upper, 1.0 / verl_lower
        kept = kept * masks.divergence_mask(
            log_prox_over_behavior, inputs.mask, inputs.sequences, REJECTIONS[where], statistic, lower, upper
        )
    any_rejected = inputs.sequences.max(1.0 - kept, inputs.mask)
    return {
        "mask": inputs.unpacked(kept * inputs.mask),
        "masked_fraction": _mean(1.0 - kept, inputs),
        "seq_masked_fraction": _float32_mean(any_rejected),
    }


def off_policy_metrics(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    """Perplexities and divergences of π_prox (training) from μ (rollout)."""
    log_r = log_ratio(inputs.prox, inputs.behavior, inputs.mask)
    training, rollout = (-_sequence_means(column, inputs) for column in (inputs.prox, inputs.behavior))
    gap = training - rollout
    sequence_log_r = inputs.sequences.sum(log_r * inputs.mask)
    return {
        "training_ppl": training.exp().mean().item(),
        "training_log_ppl": training.mean().item(),
        "rollout_ppl": rollout.exp().mean().item(),
        "rollout_log_ppl": rollout.mean().item(),
        "kl": _mean(-log_r, inputs),
        "k3_kl": _mean(ratio(log_r, LOG_RATIO_LIMIT) - 1.0 - log_r, inputs),
        "log_ppl_diff": gap.mean().item(),
        "log_ppl_abs_diff": gap.abs().mean().item(),
        "log_ppl_diff_max": gap.max().item(),
        "log_ppl_diff_min": gap.min().item(),
        "ppl_ratio": gap.exp().mean().item(),
        "chi2_token": _mean(ratio(log_r).square(), inputs) - 1.0,
        "chi2_seq": ratio(sequence_log_r).square().mean().item() - 1.0,
    }


def policy_loss(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    log_current_over_prox = log_ratio(inputs.current, inputs.prox, inputs.mask)
    bypass = case["loss"] == "bypass_reinforce"
    target = inputs.current.detach() if bypass else inputs.prox
    weight = inputs.mask
    if case["rollout_is"] != "none":
        named = re.fullmatch(r"(token|sequence)_[a-z]+_([\d.]+(?:_[\d.]+)?)", case["rollout_is"])
        if named is None:
            raise ValueError(f"unknown rollout_is {case['rollout_is']!r}: known are <token|sequence>_tis_<threshold>")
        weight = _weights(log_ratio(target, inputs.behavior, inputs.mask), inputs, named[1], named[2], False)
    objective = _objective(case, log_current_over_prox, inputs)
    loss = _aggregate(objective.loss * weight, case["loss_agg_mode"], inputs)
    return {
        "loss": loss.item(),
        "grad_cur_logp": inputs.with_gradient(loss),
        "metrics": {
            "actor/pg_clipfrac": _mean(objective.clipped, inputs),
            "actor/ppo_kl": _mean(-log_current_over_prox.detach(), inputs),
            "actor/pg_clipfrac_lower": _mean(objective.dual_clipped, inputs),
        },
    }


def _objective(case: dict[str, Any], log_current_over_prox: Tensor, inputs: Inputs) -> objectives.TokenLoss:
    config = case.get("config") or {}
    low, high = config.get("clip_ratio_low"), config.get("clip_ratio_high")
    if case["loss"] == "bypass_reinforce":
        return objectives.reinforce(inputs.current, inputs.advantages)
    if case["loss"] == "cispo":
        return objectives.cispo(log_current_over_prox, inputs.current, inputs.advantages, low, high)
    if case["loss"] == "gspo":
        per_token = objectives.sequence_log_ratio_per_token(log_current_over_prox, inputs.mask, inputs.sequences)
        return objectives.ppo_clip(per_token.clamp(max=GSPO_LOG_RATIO_BOUND), inputs.advantages, low, high)
    if case["loss"] == "vanilla":
        return objectives.ppo_clip(log_current_over_prox, inputs.advantages, low, high, config.get("clip_ratio_c"))
    raise ValueError(f"unknown loss {case['loss']!r}")


def _aggregate(token_losses: Tensor, mode: str, inputs: Inputs) -> Tensor:
    """seq-mean-token-sum-norm sums over sequences in verl and divides by the padded length only."""
    normed = mode == "seq-mean-token-sum-norm"
    sequences = 1.0 if normed else float((inputs.tokens_per_sequence > 0).sum())
    return aggregate(
        token_losses,
        mode,
        Denominators(tokens=float(inputs.mask.sum()), sequences=sequences),
        inputs.sequences,
        inputs.tokens_per_sequence + COUNT_EPSILON,
        horizon_tokens=float(max(inputs.lengths)) if normed else None,
    )
