"""AReaL's decoupled PPO in the paper's form: tokens above the cap dropped, counted in the denominator."""

from __future__ import annotations

import math
from typing import Any

from reference_formats.inputs import Inputs
from slime_async.correction.aggregation import Denominators, aggregate
from slime_async.correction.objectives import ppo_clip, sequence_log_ratio
from slime_async.correction.ratios import LOG_RATIO_LIMIT, log_ratio, ratio
from slime_async.correction.weights import dropped_weight


def decoupled_ppo(case: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> dict[str, Any]:
    ppo = {**defaults, **case["ppo"]}
    cap = case.get("behav_imp_weight_cap", defaults.get("behav_imp_weight_cap"))  # None in a case is no cap
    prox_over_behavior = ratio(log_ratio(inputs.prox, inputs.behavior, inputs.mask), LOG_RATIO_LIMIT)
    weight = dropped_weight(prox_over_behavior, upper=math.inf if cap is None else cap) * inputs.mask
    log_current_over_prox = log_ratio(inputs.current, inputs.prox, inputs.mask)
    advantages = inputs.advantages
    if ppo.get("importance_sampling_level", "token") == "sequence":
        log_current_over_prox = sequence_log_ratio(log_current_over_prox, inputs.mask, inputs.sequences)
        advantages = inputs.sequences.spread(inputs.sequences.mean(advantages, inputs.mask))
    clip_high = ppo["eps_clip"] if ppo.get("eps_clip_higher") is None else ppo["eps_clip_higher"]
    objective = ppo_clip(log_current_over_prox, advantages, ppo["eps_clip"], clip_high, ppo.get("c_clip"))
    loss = aggregate(
        objective.loss * weight,
        "token-mean",
        Denominators(tokens=float(inputs.mask.sum()), sequences=inputs.sequences.count),
        inputs.sequences,
        inputs.tokens_per_sequence,
    )
    return {
        "loss": loss.item(),
        "grad_cur_logp": inputs.with_gradient(loss),
        "behave_imp_weight": inputs.unpacked(weight),
    }
