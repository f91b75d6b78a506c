"""Traps in published implementations: each test shows the number that the trap gives and the one that is right.

Three more are with what they are about: verl's flipped ``token_k1`` and OPSM's starting point (test_weights_and_masks),
the denominator of a mask (test_policy_loss), and ESS after clamping (test_diagnostics).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction import Denominators, PolicyBatch, policy_loss
from slime_async.correction.warnings import WarningLog
from slime_async.queue.events import Accepted, TrajectoryMeta
from slime_async.queue.staleness import measure, stale_token_mask
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId


def sampled_by_two_versions() -> Trajectory:
    """Two tokens of prompt, four by version 3, two by version 7."""
    return Trajectory(
        task=TaskRef(0, "train", 0),
        sample=0,
        attempt=0,
        token_ids=np.zeros(8, dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 1, 1, 1, 1, 1], dtype=np.uint8),
        behavior_logprobs=np.full(8, -1.0, dtype=np.float32),
        spans=(VersionSpan(2, WeightId(1, 3)), VersionSpan(6, WeightId(1, 7))),
        reward=1.0,
        finish_reason="stop",
    )


def test_one_stamp_per_request_under_counts_staleness_and_lets_old_tokens_train():
    trajectory = sampled_by_two_versions()
    stamp = trajectory.spans[-1].weights.version  # what an engine reports that stamps a request at its end
    staleness = measure([Accepted(TrajectoryMeta.of(trajectory, 100), 7)], train_version=8, max_staleness=2)
    assert 8 - stamp == 1, "by its stamp the whole answer is one version old"
    assert staleness.histogram == ((1, 2), (5, 4))
    assert staleness.mean == pytest.approx((2 * 1 + 4 * 5) / 6)
    by_token = stale_token_mask(trajectory.token_versions(), 8, 2)
    by_stamp = stale_token_mask(np.where(trajectory.loss_mask, stamp, -1), 8, 2)
    assert (by_token.sum(), by_stamp.sum()) == (2, 6)


def test_time_in_the_queue_is_staleness_too():
    """Measured at delivery, a batch that waited for four versions would look as young as it was then."""
    meta = TrajectoryMeta.of(sampled_by_two_versions(), 100)
    staleness = measure([Accepted(meta, delivered_version=7)], train_version=11, max_staleness=4)
    assert staleness.in_generation == pytest.approx(4 * 4 / 6)
    assert staleness.in_queue == 4.0
    assert staleness.mean == pytest.approx(staleness.in_generation + staleness.in_queue)


def test_decoupled_ppo_weighs_by_the_sampler_without_a_second_option(stale):
    """At AReaL's head, ``use_decoupled_loss`` without the weight's own option is PPO around π_prox, and no more."""

    def gradient(preset: str) -> list[float]:
        result = policy_loss(AlgorithmConfig(preset=preset), stale.current, None, stale.batch, stale.denominators)
        return [value for row in stale.gradient(result.loss) for value in row]

    ratio = (stale.batch.prox_logprobs - stale.batch.behavior_logprobs).exp()
    weight = torch.where(ratio <= 5.0, ratio, 0.0) * stale.batch.loss_mask
    decoupled, unweighted = gradient("areal-decoupled"), gradient("none")
    assert decoupled == pytest.approx([g * w for g, w in zip(unweighted, weight.tolist(), strict=True)])
    assert decoupled == gradient("decoupled-ppo")
    assert decoupled != pytest.approx(unweighted, rel=0.1)


def test_a_high_effective_sample_size_does_not_hide_a_ruined_sequence():
    """One token of 2,000 has become impossible. The average hardly moves; the extremes say it."""
    n = 2000
    mu = torch.full((n,), -1.0)
    prox = mu.clone()
    prox[17] = -13.0
    batch = PolicyBatch(
        sequence_ids=torch.arange(n) // 10,
        num_sequences=n // 10,
        loss_mask=torch.ones(n),
        weight_mask=torch.ones(n),
        behavior_logprobs=mu,
        advantages=torch.ones(n),
        staleness=torch.ones(n, dtype=torch.long),
        prox_logprobs=prox,
    )
    config = AlgorithmConfig()
    metrics = policy_loss(config, prox.clone().requires_grad_(), None, batch, Denominators(n, n // 10)).sums.finalise()
    assert metrics["mismatch/ess"] > 0.999
    assert metrics["mismatch/sequence_ess"] > 0.99
    assert [finding.name for finding in WarningLog(config).check(0, metrics)] == ["catastrophic_token"]


def test_the_largest_weight_after_truncation_says_nothing_about_the_largest_ratio(stale):
    """verl's published maximum of token weights is the cap as soon as any token is above it; both are given here."""
    metrics = policy_loss(
        AlgorithmConfig(preset="tis"), stale.current, None, stale.batch, stale.denominators
    ).sums.finalise()
    ratio = (stale.batch.prox_logprobs - stale.batch.behavior_logprobs).exp()[stale.batch.loss_mask > 0]
    assert metrics["weight/max"] == 2.0
    assert metrics["mismatch/ratio_max"] == pytest.approx(ratio.max().item())
    assert metrics["mismatch/ratio_max"] > 9


def test_truncation_does_not_let_through_what_a_veto_is_for(stale):
    """A token that became impossible pulls its weight to 0 alone; the veto takes the sequence it has ruined."""
    prox = stale.batch.prox_logprobs.clone()
    prox[1] = stale.batch.behavior_logprobs[1] - 12.0
    batch = PolicyBatch(
        **{
            name: getattr(stale.batch, name)
            for name in ("sequence_ids", "num_sequences", "loss_mask", "weight_mask", "behavior_logprobs", "advantages")
        },
        staleness=stale.batch.staleness,
        prox_logprobs=prox,
    )

    def trained(**settings: object) -> float:
        config = AlgorithmConfig(preset="tis", **settings)
        result = policy_loss(config, stale.current, None, batch, stale.denominators)
        return result.sums.finalise()["correction/trained_fraction"]

    first_sequence = int(stale.batch.loss_mask[: stale.lengths[0]].sum())
    assert trained() == 1.0
    assert trained(veto=1e-4) == pytest.approx(1 - first_sequence / 12)
