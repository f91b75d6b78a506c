"""What a step's metrics warn of, and what to do about it: thresholds from the literature, each with its source.

A warning is a reason to look, not a verdict, and silence is no all-clear: averages hide single ruined sequences, and a
run failed whose effective sample size never left 0.98 (marin 8955).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slime_async.config.algorithm import AlgorithmConfig

REPEAT_STEPS = 50
"""A warning that persists is given again after so many steps"""
FINITE = 1e30
"""No loss of ours comes near it, and its square is no number of float32"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One warning of one step."""

    name: str
    metric: str
    value: float
    threshold: float
    advice: str

    @property
    def message(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.metric} is {self.value}: {self.advice}"
        relation = "above" if self.value > self.threshold else "below"
        return f"{self.metric} = {self.value:.4g} is {relation} {self.threshold:.4g}: {self.advice}"

    def fields(self) -> dict[str, str | float]:
        """For the event log."""
        return {
            "name": self.name,
            "metric": self.metric,
            "value": self.value,
            "threshold": self.threshold,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Rule:
    """Warns where ``metric`` is not within [``lowest``, ``highest``], and so where it is NaN."""

    name: str
    metric: str
    advice: str
    source: str
    """Where the threshold comes from"""
    lowest: float = -math.inf
    highest: float = math.inf
    applies: Callable[[AlgorithmConfig], bool] = lambda algorithm: True

    def check(self, metrics: Mapping[str, float]) -> Finding | None:
        value = metrics.get(self.metric)
        if value is None or self.lowest <= value <= self.highest:
            return None
        return Finding(self.name, self.metric, value, self.lowest if value < self.lowest else self.highest, self.advice)


RULES: tuple[Rule, ...] = (
    Rule(
        "broken_loss",
        "loss",
        "look for NaN log-probs, lower learner.learning_rate, start again from the last checkpoint",
        "ours",
        lowest=-FINITE,
        highest=FINITE,
    ),
    Rule(
        "engine_mismatch",
        "mismatch/k3/floor",
        "engine and learner disagree on the same weights: compare dtypes, temperature, top-p and the attention "
        "implementation of both before training on; with mixtures of experts replay the routing or take preset icepop",
        "https://richardli.xyz/rl-collapse: stable up to 1e-3, prone to collapse from 1e-2 on",
        highest=1e-2,
    ),
    Rule(
        "mismatch_kl",
        "mismatch/k3",
        "the data is far from the policy: lower staleness.max_staleness or learner.learning_rate; where the floor is "
        "as high, the cause is numerics and not age",
        "verl docs/algo/rollout_corr.md",
        highest=0.1,
    ),
    Rule(
        "mismatch_spread",
        "mismatch/chi2",
        "few tokens carry the gradient: bound the weights (algorithm.weight_upper), or lower staleness.max_staleness",
        "verl docs/algo/rollout_corr.md",
        highest=1.0,
    ),
    Rule(
        "mismatch_bias",
        "mismatch/ratio_mean",
        "on samples of μ the mean of π_prox/μ is 1: the sampler's log-probs are of another distribution; check that "
        "its temperature and top-p are those of the configuration",
        "verl docs/algo/rollout_corr.md",
        lowest=0.5,
        highest=2.0,
    ),
    Rule(
        "low_ess",
        "mismatch/ess",
        "most of the batch does not count: lower staleness.max_staleness, or take smaller steps between publications. "
        "(The reverse does not hold: a high effective sample size is no all-clear)",
        "verl docs/algo/rollout_corr.md; marin 8955",
        lowest=0.3,
    ),
    Rule(
        "catastrophic_token",
        "mismatch/abs_logp_diff_max",
        "a token became 10⁴ times likelier or less likely: set algorithm.veto = 1e-4, which rejects its sequence",
        "verl rollout_token_veto_threshold = 1e-4",
        highest=math.log(1e4),
        applies=lambda algorithm: algorithm.veto is None,
    ),
    Rule(
        "large_update",
        "policy/k3",
        "one batch moves the policy too far: lower learner.learning_rate or learner.optimizer_steps",
        "Huang et al. 2022, The 37 implementation details of PPO: usually below 0.02",
        highest=0.02,
        applies=lambda algorithm: algorithm.prox == "recompute",
    ),
    Rule(
        "clipping",
        "policy/clip_fraction",
        "the clip takes the gradient of every fifth token: lower learner.learning_rate or learner.optimizer_steps; "
        "with prox = 'bypass' it also cuts what is merely old: lower staleness.max_staleness or recompute π_prox",
        "arXiv 2507.18071: 0.0013 for GRPO, 0.15 for GSPO in stable runs",
        highest=0.2,
    ),
    Rule(
        "weights_out_of_bounds",
        "weight/fraction_above",
        "the weight's bound acts on every tenth token: data this stale needs a wider bound or a smaller "
        "staleness.max_staleness",
        "arXiv 2510.18855: 1 to 2 tokens in 1,000 in stable runs",
        highest=0.1,
    ),
    Rule(
        "rejection",
        "correction/rejected_fraction",
        "rejection throws away every tenth token, and rather the long answers': widen the bounds, or lower "
        "staleness.max_staleness",
        "arXiv 2510.01161: 0.0006 of the tokens at staleness 256 by second moment, 0.012 by PPO's clip",
        highest=0.1,
    ),
    Rule(
        "masked_as_stale",
        "correction/stale_fraction",
        "every fifth token is too old to train: raise staleness.max_staleness (with a correction), add actors, or "
        "bound the length of episodes",
        "ours: beyond it masking by age shortens the answers that are trained",
        highest=0.2,
    ),
    Rule(
        "nothing_trains",
        "correction/trained_fraction",
        "most tokens have no weight in the loss: see which of stale, rejected and weight/fraction_* is large",
        "ours",
        lowest=0.5,
    ),
)


class WarningLog:
    """The warnings of one run: each at its first step, then once every ``REPEAT_STEPS`` while it persists."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self._rules = [rule for rule in RULES if rule.applies(algorithm)]
        self._quiet_until: dict[str, int] = {}

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """What is to be told of this step's ``metrics`` (with the floor beside them)."""
        found = [finding for rule in self._rules if (finding := rule.check(metrics)) is not None]
        told = [finding for finding in found if step >= self._quiet_until.get(finding.name, step)]
        self._quiet_until |= {finding.name: step + REPEAT_STEPS for finding in told}
        return told
