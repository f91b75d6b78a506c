"""Warnings per step, and the floor beside the mismatch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from slime_async.config.algorithm import PRESETS, AlgorithmConfig
from slime_async.correction import Denominators, PolicyBatch, policy_loss
from slime_async.correction.floor import MismatchFloor
from slime_async.correction.warnings import REPEAT_STEPS, RULES, Rule, WarningLog

HEALTHY = {
    "loss": 0.01,
    "mismatch/k3": 1e-3,
    "mismatch/k3/floor": 5e-4,
    "mismatch/chi2": 0.01,
    "mismatch/ratio_mean": 1.0,
    "mismatch/ess": 0.99,
    "mismatch/abs_logp_diff_max": 2.0,
    "policy/k3": 0.001,
    "policy/clip_fraction": 0.01,
    "weight/fraction_above": 0.001,
    "correction/rejected_fraction": 0.0,
    "correction/stale_fraction": 0.05,
    "correction/trained_fraction": 0.94,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_healthy_step_warns_of_nothing(preset: str) -> None:
    assert WarningLog(AlgorithmConfig(preset=preset)).check(0, HEALTHY) == []
    assert {rule.metric for rule in RULES} == HEALTHY.keys(), "every rule was asked"


@pytest.mark.parametrize(
    ("metric", "value", "name", "advice"),
    [
        ("loss", math.nan, "broken_loss", "learner.learning_rate"),
        ("loss", math.inf, "broken_loss", "last checkpoint"),
        ("mismatch/k3/floor", 0.02, "engine_mismatch", "compare dtypes"),
        ("mismatch/k3", 0.3, "mismatch_kl", "staleness.max_staleness"),
        ("mismatch/chi2", 4.0, "mismatch_spread", "algorithm.weight_upper"),
        ("mismatch/ratio_mean", 0.4, "mismatch_bias", "temperature"),
        ("mismatch/ratio_mean", 2.5, "mismatch_bias", "temperature"),
        ("mismatch/ess", 0.2, "low_ess", "no all-clear"),
        ("mismatch/abs_logp_diff_max", 12.0, "catastrophic_token", "algorithm.veto = 1e-4"),
        ("policy/k3", 0.05, "large_update", "learner.optimizer_steps"),
        ("policy/clip_fraction", 0.4, "clipping", "learner.learning_rate"),
        ("weight/fraction_above", 0.3, "weights_out_of_bounds", "wider bound"),
        ("correction/rejected_fraction", 0.5, "rejection", "widen the bounds"),
        ("correction/stale_fraction", 0.5, "masked_as_stale", "add actors"),
        ("correction/trained_fraction", 0.1, "nothing_trains", "which of"),
    ],
)
def test_each_threshold_warns_with_the_number_and_what_to_do(metric: str, value: float, name: str, advice: str) -> None:
    (finding,) = WarningLog(AlgorithmConfig()).check(3, HEALTHY | {metric: value})
    assert finding.name == name
    assert finding.message.startswith(metric)
    assert f"{value:.4g}" in finding.message
    assert advice in finding.message
    assert finding.fields()["message"] == finding.message


def test_a_warning_that_persists_is_given_again_only_now_and_then() -> None:
    log = WarningLog(AlgorithmConfig())
    bad = HEALTHY | {"mismatch/k3": 0.3}
    given = [step for step in range(2 * REPEAT_STEPS + 1) if log.check(step, bad)]
    assert given == [0, REPEAT_STEPS, 2 * REPEAT_STEPS]
    both = log.check(2 * REPEAT_STEPS + 1, bad | {"mismatch/ess": 0.1})
    assert [finding.name for finding in both] == ["low_ess"], "another warning is not held back by the first"


def test_a_rule_is_silent_where_its_remedy_is_in_place_or_its_metric_absent() -> None:
    extreme = HEALTHY | {"mismatch/abs_logp_diff_max": 12.0, "policy/k3": 1.0}
    assert [f.name for f in WarningLog(AlgorithmConfig(preset="ppo", veto=None)).check(0, extreme)] == [
        "catastrophic_token"
    ], "with π_prox = μ the policy ratio holds the staleness, too"
    assert [f.name for f in WarningLog(AlgorithmConfig(veto=1e-4)).check(0, extreme)] == ["large_update"]
    assert WarningLog(AlgorithmConfig()).check(0, {}) == []


def test_every_rule_has_a_bound_a_source_and_advice() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.source and rule.advice for rule in RULES)
    assert all(math.isfinite(rule.lowest) or math.isfinite(rule.highest) for rule in RULES)
    assert Rule("x", "m", "advice", "source", highest=1.0).check({"m": 1.0}) is None, "a bound itself is within"


def test_the_floor_is_the_fresh_bucket_of_the_first_batch_that_has_one() -> None:
    floor = MismatchFloor()
    assert floor.beside({"mismatch/k3": 0.2, "mismatch/k3/staleness_2-3": 0.2}) == {}
    first = {"mismatch/k3": 0.1, "mismatch/k3/staleness_0": 1e-6, "mismatch/k3/staleness_1": 0.2, "loss": 1.0}
    assert floor.beside(first) == {"mismatch/k3/floor": 1e-6}
    assert floor.beside({"mismatch/k3": 0.3, "mismatch/k3/staleness_0": 0.5}) == {"mismatch/k3/floor": 1e-6}


def test_every_mismatch_figure_of_a_mixed_batch_has_its_floor() -> None:
    """Two sequences: a fresh one that differs by numerics, an old one that differs by age."""
    mu = torch.tensor([-1.0, -2.0, -1.0, -2.0])
    batch = PolicyBatch(
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
        loss_mask=torch.ones(4),
        weight_mask=torch.ones(4),
        behavior_logprobs=mu,
        advantages=torch.ones(4),
        staleness=torch.tensor([0, 0, 2, 2]),
    )
    current = mu + torch.tensor([1e-4, -1e-4, 0.5, -0.5])
    result = policy_loss(AlgorithmConfig(), current.requires_grad_(), None, batch, Denominators(4, 2))
    metrics = result.sums.finalise()
    beside = MismatchFloor().beside(metrics)
    figures = {name for name in metrics if name.startswith("mismatch/") and "staleness" not in name}
    assert {name.removesuffix("/floor") for name in beside} == figures
    assert beside["mismatch/abs_logp_diff_max/floor"] == pytest.approx(1e-4, rel=1e-2)
    assert metrics["mismatch/abs_logp_diff_max"] == pytest.approx(0.5)


def test_the_guide_lists_every_warning_with_its_metric_or_threshold() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "off-policy.md").read_text()
    rows = {line.split("`")[1]: line for line in guide.splitlines() if line.startswith("| `")}
    for rule in RULES:
        assert rule.name in rows, rule.name
        bounds = [f"{bound:g}" for bound in (rule.lowest, rule.highest) if math.isfinite(bound)]
        if rule.name not in ("broken_loss", "catastrophic_token"):  # which are in words
            assert all(bound in rows[rule.name] for bound in bounds), (rows[rule.name], bounds)
