"""Objective and off-policy correction: what ``slime_async.correction`` computes, chosen by name.

A preset sets every other field; a field that the user sets wins over the preset::

    [algorithm]
    preset = "icepop"
    weight_upper = 3.0          # all else as IcePop has it

Ratios are named by direction. Bounds on weights and rejection are bounds of π_prox/μ (``prox_over_behavior``), bounds
of the clip are bounds of π_θ/π_prox (``current_over_prox``). No torch here: actors and the hub read it, too.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from pydantic import Field, PositiveFloat, model_validator

from slime_async.config.base import Section

PresetName = Literal[
    "decoupled-ppo",
    "areal-decoupled",
    "ppo",
    "tis",
    "tis-sequence",
    "icepop",
    "mis",
    "m2po",
    "cispo",
    "gspo",
    "reinforce",
    "topr",
    "none",
]
Advantage = Literal["grpo", "grpo-no-std", "rloo", "reinforce++", "reinforce++-baseline", "gae"]
ProxSource = Literal["recompute", "bypass", "interpolate"]
WeightKind = Literal["none", "truncate", "drop"]
Level = Literal["token", "sequence", "geometric"]
Rejection = Literal["none", "token", "sequence-sum", "sequence-mean", "sequence-max"]
Statistic = Literal["k1", "k2", "k3"]
ObjectiveName = Literal["ppo-clip", "gspo", "gspo-token", "cispo", "reinforce", "topr"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
KLForm = Literal["k1", "k2", "k3", "unbiased"]

_RATIO_OBJECTIVES: Final = ("ppo-clip", "gspo", "gspo-token")

PRESETS: Final[dict[str, dict[str, Any]]] = {
    # arXiv 2505.24298, eq. 5: clip around π_prox, weight π_prox/μ, tokens above the cap dropped
    "decoupled-ppo": {},
    "areal-decoupled": {},
    # arXiv 1707.06347 on stale data as it is: the clip is around μ
    "ppo": {"prox": "bypass", "weight": "none"},
    # truncated importance sampling of the engine's mismatch: https://fengyao.notion.site/off-policy-rl
    "tis": {"weight": "truncate", "weight_upper": 2.0},
    "tis-sequence": {"weight": "truncate", "weight_level": "sequence", "weight_upper": 2.0},
    # arXiv 2510.18855 (Ring-1T): weight kept inside a band, zero outside
    "icepop": {"weight": "drop", "weight_lower": 0.5, "weight_upper": 5.0},
    # masked importance sampling: https://richardli.xyz/rl-collapse; sequences above the cap dropped
    "mis": {"weight": "drop", "weight_level": "sequence", "weight_upper": 2.0},
    # arXiv 2510.01161: π_θ/μ unclipped, outliers masked until the batch's second moment is within the bound
    "m2po": {"weight": "truncate", "weight_upper": None, "second_moment": 0.04, "clip_low": None, "clip_high": None},
    # arXiv 2506.13585 (MiniMax-M1): the clipped ratio is a detached weight, so no token loses its gradient
    "cispo": {"objective": "cispo", "weight": "truncate", "weight_upper": 2.0, "clip_low": 1.0, "clip_high": 0.28},
    # arXiv 2507.18071: ratio and clip of the whole sequence
    "gspo": {
        "objective": "gspo",
        "weight": "truncate",
        "weight_upper": 2.0,
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq-mean-token-mean",
    },
    # truncated weight and plain policy gradient, no clip
    "reinforce": {"objective": "reinforce", "weight": "truncate", "weight_upper": 2.0},
    # arXiv 2503.14286: gains as they are, losses weighted by the trajectory's ratio to μ, at most 1
    "topr": {"objective": "topr", "prox": "bypass", "weight": "none", "aggregation": "seq-mean-token-sum"},
    # on-policy PPO-clip: nothing is corrected
    "none": {"weight": "none"},
}


class AlgorithmConfig(Section):
    """Advantages, importance weights, rejection masks and the objective."""

    preset: PresetName = "decoupled-ppo"
    """A published method by name; it sets the fields below that you leave out"""
    advantage: Advantage = "grpo"
    """Baseline and scale of an episode's reward, from its group's or the batch's rewards; or, per token, from a critic
    (gae)"""
    prox: ProxSource = "recompute"
    """π_prox: the learner before the update, recomputed; or μ itself (bypass); or between μ and π_θ by staleness"""
    weight: WeightKind = "drop"
    """Detached π_prox/μ on each token's loss: none, truncated at the bounds, or dropped (zero) outside them"""
    weight_level: Level = "token"
    """Ratio of the token, of the sequence (product), or its geometric mean per token"""
    weight_lower: float = Field(0.0, ge=0)
    """Smallest weight; 0 is no bound"""
    weight_upper: PositiveFloat | None = 5.0
    """Largest weight; unbounded when not set"""
    weight_normalize: bool = False
    """Divide the weights by their mean over the batch; needs batch statistics"""
    reject: Rejection = "none"
    """Reject tokens, or whole sequences by the sum, mean or maximum of a statistic of π_prox/μ"""
    reject_statistic: Statistic = "k1"
    """k1: the log-ratio, bounds are ratios (mean: of the geometric mean); k2: its square / 2; k3: r − 1 − log r"""
    reject_lower: float = Field(0.0, ge=0)
    """Smallest ratio kept; for k1 alone"""
    reject_upper: PositiveFloat | None = None
    """Largest ratio kept for k1, largest statistic kept for k2 and k3"""
    veto: PositiveFloat | None = None
    """Reject a sequence when any of its tokens has π_prox/μ below this; off when not set"""
    opsm_delta: float | None = Field(None, ge=0)
    """Reject a sequence of negative advantage when its mean log(μ/π_θ) exceeds this; off when not set"""
    second_moment: PositiveFloat | None = None
    """Reject the largest (log π_prox/μ)² until their batch mean is within this; needs batch statistics"""
    objective: ObjectiveName = "ppo-clip"
    """What is maximised, on π_θ/π_prox"""
    clip_low: float | None = Field(0.2, ge=0, le=1)
    """π_θ/π_prox is clipped below 1 − this; not clipped when not set"""
    clip_high: float | None = Field(0.2, ge=0)
    """π_θ/π_prox is clipped above 1 + this; not clipped when not set"""
    dual_clip: float | None = Field(None, gt=1)
    """Bound on the ratio where the advantage is negative; off when not set"""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number; denominators count tokens before any masking"""
    horizon_tokens: PositiveFloat | None = None
    """The constant that seq-mean-token-sum-norm divides by, in place of a sequence's own length"""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference policy; 0 needs no reference"""
    kl_form: KLForm = "k3"
    """Estimator of KL(π_θ ‖ π_ref); unbiased is k3 times π_θ/μ, right in value and in gradient off-policy"""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus"""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        """Fields left out take the preset's values."""
        if not isinstance(data, dict):
            return data
        return {**PRESETS.get(data.get("preset", "decoupled-ppo"), {}), **data}

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> AlgorithmConfig:
        for problem in (*self._bound_problems(), *self._combination_problems()):
            raise ValueError(problem)
        return self

    def _bound_problems(self) -> list[str]:
        problems = []
        for name in ("weight", "reject"):
            lower, upper = getattr(self, f"{name}_lower"), getattr(self, f"{name}_upper")
            if upper is not None and lower >= upper:
                problems.append(f"{name}_lower = {lower} is not below {name}_upper = {upper}: no ratio would pass")
        for name, value in self:
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{name} = {value} is not finite: leave the field out to have no bound")
        if self.weight == "drop" and self.weight_upper is not None and self.weight_upper <= 1:
            problems.append(f"weight_upper = {self.weight_upper} drops on-policy tokens (ratio 1): set it above 1")
        if self.weight == "drop" and self.weight_lower >= 1:
            problems.append(f"weight_lower = {self.weight_lower} drops on-policy tokens (ratio 1): set it below 1")
        return problems

    def _combination_problems(self) -> list[str]:
        problems = []
        if self.prox == "bypass" and (self.weight != "none" or self.reject != "none" or self.veto is not None):
            problems.append(
                "prox = 'bypass' makes π_prox/μ 1 everywhere, so weight, reject and veto would do nothing: "
                "set weight = 'none' and reject = 'none', or prox = 'recompute'"
            )
        if self.reject != "none" and self.reject_upper is None and self.reject_lower == 0:
            problems.append(f"reject = '{self.reject}' has no bound: set reject_upper (or reject_lower)")
        if self.reject_statistic != "k1" and self.reject_lower > 0:
            problems.append(
                f"reject_lower = {self.reject_lower} bounds a ratio, which {self.reject_statistic} is not: "
                "use reject_statistic = 'k1' or drop reject_lower"
            )
        if self.reject == "sequence-max" and self.reject_statistic == "k1":
            problems.append(
                "reject = 'sequence-max' takes reject_statistic = 'k2' or 'k3'; k1's minimum is what veto does"
            )
        if self.objective == "topr" and self.prox != "bypass":
            problems.append(f"objective = 'topr' takes its ratio to μ: set prox = 'bypass', not '{self.prox}'")
        if self.second_moment is not None and self.prox != "recompute":
            problems.append(f"second_moment needs π_prox before the update: set prox = 'recompute', not '{self.prox}'")
        if self.weight_normalize and (self.weight == "none" or self.prox != "recompute"):
            problems.append(
                f"weight_normalize needs a weight and π_prox before the update, but weight = '{self.weight}' and "
                f"prox = '{self.prox}': set weight = 'truncate' and prox = 'recompute', or weight_normalize = false"
            )
        if self.dual_clip is not None and self.objective not in _RATIO_OBJECTIVES:
            problems.append(f"dual_clip bounds a ratio in the loss, which '{self.objective}' has not: leave it out")
        if self.aggregation == "seq-mean-token-sum-norm" and self.horizon_tokens is None:
            problems.append("aggregation = 'seq-mean-token-sum-norm' divides by a constant: set horizon_tokens")
        return problems

    @property
    def needs_batch_statistics(self) -> bool:
        """Whether the loss needs ``correction.batch_statistics`` of the whole batch, and so π_prox beforehand."""
        return self.weight_normalize or self.second_moment is not None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference policy's log-probs."""
        return self.kl_coef > 0
