"""Weights and masks, and the traps in their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction import batch_statistics, policy_loss
from slime_async.correction.masks import (
    divergence_mask,
    off_policy_sequence_mask,
    second_moment_cutoff,
    second_moment_mask,
    veto_mask,
)
from slime_async.correction.ratios import Sequences, log_ratio, ratio
from slime_async.correction.weights import dropped_weight, importance_weight, truncated_weight

ONE = Sequences(torch.zeros(5, dtype=torch.long), 1)
TWO = Sequences(torch.tensor([0, 0, 0, 1, 1]), 2)
ALL = torch.ones(5)
RATIOS = torch.tensor([0.05, 0.5, 1.0, 1.5, 11.0])


def test_truncation_keeps_a_tokens_vote_and_dropping_takes_it():
    assert truncated_weight(RATIOS, upper=2.0).tolist() == pytest.approx([0.05, 0.5, 1.0, 1.5, 2.0])
    assert truncated_weight(RATIOS, 0.1, 2.0).tolist() == pytest.approx([0.1, 0.5, 1.0, 1.5, 2.0])
    assert dropped_weight(RATIOS, 0.1, 2.0).tolist() == pytest.approx([0.0, 0.5, 1.0, 1.5, 0.0])


def test_the_level_says_whose_ratio_the_weight_is():
    logs = torch.tensor([0.1, 0.2, -0.6, 0.5, 0.3])
    product = importance_weight(AlgorithmConfig(preset="tis-sequence", weight_upper=50.0), logs, ALL, TWO)
    mean = importance_weight(AlgorithmConfig(preset="tis", weight_level="geometric"), logs, ALL, TWO)
    assert product.log().tolist() == pytest.approx([-0.3, -0.3, -0.3, 0.8, 0.8], rel=1e-5)
    assert mean.log().tolist() == pytest.approx([-0.1, -0.1, -0.1, 0.4, 0.4], rel=1e-5)


def test_weights_carry_no_gradient_even_where_prox_is_the_current_policy(stale):
    with_weight = policy_loss(
        AlgorithmConfig(preset="reinforce"), stale.current, None, stale.batch, stale.denominators
    ).loss
    expected = -stale.batch.advantages * ratio(
        log_ratio(stale.batch.prox_logprobs, stale.batch.behavior_logprobs, stale.batch.loss_mask)
    ).clamp(max=2.0)
    flat = [value for row in stale.gradient(with_weight) for value in row]
    assert flat == pytest.approx((expected * stale.batch.loss_mask / 12).tolist())


def test_normalised_weights_have_mean_one_over_the_batch(stale):
    config = AlgorithmConfig(preset="tis", weight_normalize=True)
    statistics = batch_statistics(config, [stale.batch])
    result = policy_loss(config, stale.current, None, stale.batch, stale.denominators, statistics)
    assert result.sums.finalise()["weight/mean"] == pytest.approx(1.0)


def test_bounds_on_k1_are_ratios_and_not_flipped():
    """verl's token_k1 tests −log r: its "0.1_1.2" keeps ratios in [0.83, 10]. Ours keeps what it says."""
    ours = divergence_mask(RATIOS.log(), ALL, ONE, "token", "k1", 0.1, 1.2)
    assert ours.tolist() == [0, 1, 1, 0, 0]
    as_verl_has_it = divergence_mask(RATIOS.log(), ALL, ONE, "token", "k1", 1 / 1.2, 1 / 0.1)
    assert as_verl_has_it.tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("rejection", "statistic", "lower", "upper", "kept"),
    [
        ("token", "k2", 0.0, 0.1, [0, 0, 1, 1, 0]),
        ("token", "k3", 0.0, 0.1, [0, 0, 1, 1, 0]),
        ("sequence-sum", "k1", 0.01, 2.0, [1, 1, 1, 0, 0]),
        ("sequence-mean", "k1", 0.2, 2.0, [1, 1, 1, 0, 0]),
        ("sequence-mean", "k3", 0.0, 1.0, [1, 1, 1, 0, 0]),
        ("sequence-max", "k2", 0.0, 4.0, [0, 0, 0, 1, 1]),
    ],
)
def test_rejection_by_token_and_by_sequence(rejection, statistic, lower, upper, kept):
    assert divergence_mask(RATIOS.log(), ALL, TWO, rejection, statistic, lower, upper).tolist() == kept


def test_masked_positions_count_for_no_sequence():
    mask = torch.tensor([0.0, 1, 1, 1, 0])
    assert divergence_mask(RATIOS.log() * mask, mask, TWO, "sequence-max", "k2", upper=0.3).tolist() == [1] * 5
    assert veto_mask(RATIOS.log() * mask, mask, TWO, 0.1).tolist() == [1] * 5


def test_one_catastrophic_token_vetoes_its_sequence():
    assert veto_mask(RATIOS.log(), ALL, TWO, 0.1).tolist() == [0, 0, 0, 1, 1]


def test_opsm_rejects_only_bad_sequences_that_the_policy_has_left():
    left = torch.tensor([0.3, 0.2, 0.1, 0.01, 0.0])
    bad, good = -ALL, ALL
    assert off_policy_sequence_mask(left, bad, ALL, TWO, 0.1).tolist() == [0, 0, 0, 1, 1]
    assert off_policy_sequence_mask(left, good, ALL, TWO, 0.1).tolist() == [1] * 5


def test_opsm_measures_from_the_sampler_so_mismatch_counts(stale):
    config = AlgorithmConfig(preset="none", opsm_delta=0.035)
    metrics = policy_loss(config, stale.current, None, stale.batch, stale.denominators).sums.finalise()
    # the third sequence: 0.027 from π_prox, but 0.04 from μ
    assert metrics["correction/rejected_fraction"] == pytest.approx(8 / 12)


@given(st.lists(st.floats(0, 4), min_size=1, max_size=30), st.floats(0.01, 2))
def test_m2po_keeps_the_most_tokens_whose_second_moment_is_within_the_bound(moments, bound):
    values = torch.tensor(moments, dtype=torch.float64)
    cutoff = second_moment_cutoff(values, bound)
    kept = values[values <= cutoff]
    if len(kept):
        assert float(kept.mean()) <= bound * (1 + 1e-12)
    rejected = values[values > cutoff]
    if len(rejected):
        one_more = values[values <= rejected.min()]
        assert float(one_more.mean()) > bound * (1 - 1e-12)


def test_m2po_masks_the_outlier_alone():
    logs = torch.tensor([0.1, -0.1, 0.05, 0.0, 2.0])
    cutoff = second_moment_cutoff(logs.square(), 0.04)
    assert second_moment_mask(logs, cutoff).tolist() == [1, 1, 1, 1, 0]
    assert second_moment_cutoff(torch.empty(0), 0.04) == math.inf
    assert second_moment_cutoff(torch.ones(3), 0.04) == -1.0
