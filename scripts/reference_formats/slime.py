"""slime's losses with TIS, IcePop and MIS, and its off-policy sequence mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reference_formats.inputs import Inputs, to_float32
from slime_async.correction import masks, objectives
from slime_async.correction.aggregation import Denominators, aggregate
from slime_async.correction.ratios import log_ratio, ratio
from slime_async.correction.weights import dropped_weight, level_log_ratio, truncated_weight

NEGLIGIBLE_MEAN_WEIGHT = 1e-8
"""slime leaves weights alone when their mean is below this."""


def policy_loss(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    """The sum over samples of their mean token loss; a sample's mean divides by its tokens before any masking."""
    arguments = case["correction_args"] or {}
    log_prox_over_behavior = log_ratio(inputs.prox, inputs.behavior, inputs.mask)
    weight, kept = torch.ones_like(inputs.mask), torch.ones_like(inputs.mask)
    if arguments.get("use_tis"):
        weight, kept = _mis(arguments, log_prox_over_behavior, inputs)
    elif case["correction"] == "vanilla_tis":
        low, high = arguments.get("tis_clip_low", 0.0), arguments["tis_clip"]
        weight = truncated_weight(ratio(log_prox_over_behavior), low, high)
    elif case["correction"] == "icepop":
        weight = dropped_weight(ratio(log_prox_over_behavior), arguments["tis_clip_low"], arguments["tis_clip"])
    elif case["correction"] != "none" and "use_tis" not in arguments:
        raise ValueError(f"unknown correction {case['correction']!r}")
    objective = _objective(case, inputs)
    loss = aggregate(
        objective.loss * weight * kept * inputs.mask,
        "seq-mean-token-mean",
        Denominators(tokens=float(inputs.mask.sum()), sequences=1.0),  # a sum over samples, not their mean
        inputs.sequences,
        inputs.tokens_per_sequence,
    )
    return {
        "loss_sum_of_sample_means": loss.item(),
        "grad_cur_logp": inputs.with_gradient(loss),
        "weights": None if arguments.get("use_tis") is False else inputs.unpacked(weight * inputs.mask),
        "modified_masks": inputs.unpacked(kept * inputs.mask),
    }


def _objective(case: dict[str, Any], inputs: Inputs) -> objectives.TokenLoss:
    log_current_over_prox = log_ratio(inputs.current, inputs.prox, inputs.mask)
    low, high = case["eps_clip"], case["eps_clip_high"]
    if case["estimator"] == "cispo":
        return objectives.cispo(log_current_over_prox, inputs.current, inputs.advantages, low, high)
    if case["estimator"] == "gspo":
        log_current_over_prox = objectives.sequence_log_ratio(log_current_over_prox, inputs.mask, inputs.sequences)
    return objectives.ppo_clip(log_current_over_prox, inputs.advantages, low, high, case.get("eps_clip_c"))


def _mis(arguments: dict[str, Any], log_prox_over_behavior: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Weights and mask; ``mask`` mode leaves dropped tokens their weight and takes them out by the mask."""
    level, upper = arguments["tis_level"], arguments["tis_upper_bound"]
    lower = 1.0 / upper if arguments["tis_lower_bound"] is None else arguments["tis_lower_bound"]
    at_level = level_log_ratio(log_prox_over_behavior, inputs.mask, inputs.sequences, level)
    raw, kept = ratio(at_level), torch.ones_like(inputs.mask)
    weight = raw
    if arguments["tis_mode"] == "truncate":
        weight = truncated_weight(raw, upper=upper)
    elif arguments["tis_mode"] == "clip":
        weight = truncated_weight(raw, lower, upper)
    else:
        kept = (dropped_weight(raw, lower, upper) > 0).double()
    if arguments["use_rs"]:
        kept = kept * _rejection(arguments, log_prox_over_behavior, inputs, lower, upper)
    if arguments["tis_batch_normalize"]:
        mean = _mean_weight(weight, level, inputs)
        weight = weight / mean if mean > NEGLIGIBLE_MEAN_WEIGHT else weight
    return weight, kept


def _rejection(
    arguments: dict[str, Any], log_prox_over_behavior: Tensor, inputs: Inputs, tis_lower: float, tis_upper: float
) -> Tensor:
    lower = tis_lower if arguments["rs_lower_bound"] is None else arguments["rs_lower_bound"]
    upper = tis_upper if arguments["rs_upper_bound"] is None else arguments["rs_upper_bound"]
    at_level = level_log_ratio(log_prox_over_behavior, inputs.mask, inputs.sequences, arguments["rs_level"])
    kept = masks.divergence_mask(at_level, inputs.mask, inputs.sequences, "token", "k1", lower, upper)
    veto = arguments.get("rs_veto_threshold")
    if veto is not None:
        kept = kept * masks.veto_mask(log_prox_over_behavior, inputs.mask, inputs.sequences, veto)
    return kept


def _mean_weight(weight: Tensor, level: str, inputs: Inputs) -> float:
    if level == "token":
        return float((weight * inputs.mask).sum() / inputs.mask.sum().clamp(min=1.0))
    return float(inputs.sequences.mean(weight, inputs.mask).mean())


def off_policy_sequence_mask(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    """slime takes π_old = π_prox; its clip fraction counts rejected tokens, prompt included, over sampled ones."""
    log_prox_over_current = log_ratio(inputs.prox, inputs.current.detach(), inputs.mask)
    kept = masks.off_policy_sequence_mask(
        log_prox_over_current, inputs.advantages, inputs.mask, inputs.sequences, case["opsm_delta"]
    )
    rejected_share = inputs.sequences.sum(1.0 - kept) / inputs.tokens_per_sequence.clamp(min=1.0)
    return {"mask": inputs.unpacked(kept), "clipfrac": to_float32(rejected_share.float().sum().item())}
