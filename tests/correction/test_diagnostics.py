"""Metrics as sums: what they say, and that they say it however the batch is cut."""

import pytest
import torch

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction import MetricSums, policy_loss
from slime_async.correction.diagnostics import MAX_NAMES, STALENESS_LABELS, SUM_NAMES


def metrics_of(packed, **settings) -> dict[str, float]:
    config = AlgorithmConfig(**settings)
    return policy_loss(config, packed.current, None, packed.batch, packed.denominators).sums.finalise()


def test_mismatch_and_policy_are_told_apart(packed):
    metrics = metrics_of(packed)
    sampled = packed.batch.loss_mask > 0
    mismatch = (packed.batch.prox_logprobs - packed.batch.behavior_logprobs)[sampled]
    policy = (packed.current.detach() - packed.batch.prox_logprobs)[sampled]
    for which, logs in (("mismatch", mismatch), ("policy", policy)):
        r = logs.exp()
        assert metrics[f"{which}/ratio_mean"] == pytest.approx(r.mean().item())
        assert metrics[f"{which}/ratio_std"] == pytest.approx(r.std(correction=0).item())
        assert metrics[f"{which}/ratio_min"] == pytest.approx(r.min().item())
        assert metrics[f"{which}/ratio_max"] == pytest.approx(r.max().item())
        assert metrics[f"{which}/k1"] == pytest.approx(-logs.mean().item())
        assert metrics[f"{which}/k3"] == pytest.approx((r - 1 - logs).mean().item())
        assert metrics[f"{which}/chi2"] == pytest.approx(r.square().mean().item() - 1)
        assert metrics[f"{which}/ess"] == pytest.approx((r.sum() ** 2 / r.square().sum() / len(r)).item())
        assert metrics[f"{which}/abs_logp_diff_mean"] == pytest.approx(logs.abs().mean().item())
        assert metrics[f"{which}/abs_logp_diff_max"] == pytest.approx(logs.abs().max().item())


def test_divergences_agree_with_verls(packed, reference_case):
    expected = reference_case("verl_rollout_correction", f"offpolicy_metrics/{packed.name}")["expected"]
    metrics = metrics_of(packed)
    # verl divides by the count plus 1e-8
    assert metrics["mismatch/k1"] == pytest.approx(expected["kl"], rel=1e-8)
    assert metrics["mismatch/k3"] == pytest.approx(expected["k3_kl"], rel=1e-8)
    assert metrics["mismatch/chi2"] == pytest.approx(expected["chi2_token"], rel=1e-7)
    assert metrics["mismatch/sequence_chi2"] == pytest.approx(expected["chi2_seq"], rel=1e-7)


def test_effective_sample_size_after_clamping_reads_too_high(stale, reference_case):
    clamped = reference_case("verl_rollout_correction", "is/stale3/token/1.1/bn=False")["expected"]["metrics"]
    metrics = metrics_of(stale, preset="tis", weight_upper=1.1)
    assert clamped["rollout_is_eff_sample_size"] > 0.99
    assert metrics["mismatch/ess"] < 0.4
    assert metrics["mismatch/ess"] == metrics_of(stale, preset="none")["mismatch/ess"]


def test_ratios_are_reported_before_truncation_and_weights_after(stale):
    metrics = metrics_of(stale, preset="tis")
    assert metrics["mismatch/ratio_max"] == pytest.approx(9.974182454814718)
    assert metrics["weight/max"] == 2.0
    assert metrics["weight/fraction_above"] == pytest.approx(3 / 12)
    assert metrics_of(stale, preset="icepop")["weight/fraction_below"] == pytest.approx(4 / 12)
    assert metrics_of(stale)["correction/trained_fraction"] == pytest.approx(9 / 12)


def test_metrics_by_staleness_partition_the_tokens(stale):
    metrics = metrics_of(stale)
    by_bucket = {label: metrics.get(f"tokens/staleness_{label}", 0.0) for label in STALENESS_LABELS}
    assert by_bucket == {"0": 0.0, "1": 3.0, "2-3": 1.0, "4-7": 1.0, "8+": 7.0}
    assert metrics["mismatch/k3/staleness_1"] < metrics["mismatch/k3/staleness_8+"]
    assert "mismatch/k3/staleness_0" not in metrics
    names = {name for name in metrics if "staleness" not in name}
    for label in ("1", "2-3", "4-7", "8+"):
        bucket = {name.removesuffix(f"/staleness_{label}") for name in metrics if name.endswith(f"_{label}")}
        # a sequence is in the bucket of its oldest token; one without any has no such figures
        assert {name for name in names - bucket if "sequence" not in name} == set()


def test_merging_is_what_two_all_reduces_do(packed):
    config = AlgorithmConfig()
    sums = policy_loss(config, packed.current, None, packed.batch, packed.denominators).sums
    assert sums.sums.shape == (len(SUM_NAMES), 1 + len(STALENESS_LABELS))
    assert sums.maxima.shape == (len(MAX_NAMES), 1 + len(STALENESS_LABELS))
    assert sums.merge(MetricSums.zero()).finalise() == sums.finalise()
    twice = sums.merge(sums).finalise()
    assert twice["tokens"] == 2 * sums.finalise()["tokens"]
    assert twice["mismatch/ratio_mean"] == pytest.approx(sums.finalise()["mismatch/ratio_mean"])


def test_no_tokens_give_no_metrics():
    assert MetricSums.zero().finalise() == {}
    assert torch.isinf(MetricSums.zero().maxima).all()
