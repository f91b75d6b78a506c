"""Objectives, KL, aggregation and π_prox as functions."""

import math

import pytest
import torch

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction import objectives, policy_loss
from slime_async.correction.aggregation import Denominators, aggregate
from slime_async.correction.kl import reference_kl
from slime_async.correction.prox import interpolated_logprobs
from slime_async.correction.ratios import Sequences

LOGS = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5], dtype=torch.float64)
GAIN, LOSS = torch.ones(5, dtype=torch.float64), -torch.ones(5, dtype=torch.float64)


def gradient_of(terms: objectives.TokenLoss, variable: torch.Tensor) -> list[float]:
    return torch.autograd.grad(terms.loss.sum(), variable)[0].tolist()


def test_ppo_clip_stops_the_gradient_only_in_the_direction_already_gone():
    logs = LOGS.clone().requires_grad_()
    up = gradient_of(objectives.ppo_clip(logs, GAIN), logs)
    down = gradient_of(objectives.ppo_clip(logs, LOSS), logs)
    assert [g != 0 for g in up] == [True, True, True, False, False]
    assert [g != 0 for g in down] == [False, False, True, True, True]


def test_clip_bounds_are_separate_and_may_be_absent():
    logs = torch.tensor([math.log(1.25)], dtype=torch.float64)
    assert objectives.ppo_clip(logs, GAIN[:1], 0.2, 0.28).loss.item() == pytest.approx(-1.25)
    assert objectives.ppo_clip(logs, GAIN[:1], 0.2, 0.2).loss.item() == pytest.approx(-1.2)
    assert objectives.ppo_clip(LOGS, GAIN, None, None).loss.tolist() == pytest.approx((-LOGS.exp()).tolist())


def test_the_dual_clip_bounds_only_what_went_badly():
    logs = LOGS.clone().requires_grad_()
    bounded = objectives.ppo_clip(logs, LOSS, 0.2, 0.2, dual_clip=3.0)
    assert bounded.loss.tolist()[-1] == pytest.approx(3.0)
    assert gradient_of(bounded, logs)[-1] == 0.0
    assert bounded.dual_clipped.tolist() == [False, False, False, False, True]
    assert not objectives.ppo_clip(LOGS, GAIN, 0.2, 0.2, dual_clip=3.0).dual_clipped.any()


def test_cispo_gives_every_token_a_gradient():
    current = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    terms = objectives.cispo(LOGS, current, GAIN, 0.2, 0.28)
    expected = [-min(max(math.exp(x), 0.8), 1.28) for x in LOGS.tolist()]
    assert gradient_of(terms, current) == pytest.approx(expected)


def test_topr_imitates_gains_and_tapers_losses_by_the_trajectory():
    sequences = Sequences(torch.tensor([0, 0, 0, 1, 1]), 2)
    current = torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True)
    gains = objectives.topr(LOGS, current, GAIN, GAIN, sequences)
    losses = objectives.topr(LOGS, current, LOSS, GAIN, sequences)
    assert gradient_of(gains, current) == pytest.approx([-1.0] * 5)
    assert gradient_of(losses, current) == pytest.approx([math.exp(-2.0)] * 3 + [1.0] * 2)
    assert losses.clipped.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("form", ["k2", "k3", "unbiased"])
def test_kl_estimates_have_the_gradient_of_their_value(form):
    torch.manual_seed(0)
    current, ref, behavior = (-torch.rand(6, dtype=torch.float64) for _ in range(3))
    current.requires_grad_()
    mask = torch.tensor([0.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: reference_kl(form, x, ref, behavior, mask), (current,))


def test_the_unbiased_form_has_the_kls_value_and_gradient_off_policy():
    """Exactly, by summing over a small vocabulary; k1's gradient is 0 and k3's is of the other direction."""
    torch.manual_seed(1)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref, behavior = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
    current = logits.log_softmax(0)
    kl = (current.exp() * (current - ref)).sum()
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)
    ones = torch.ones(7, dtype=torch.float64)
    estimate = (behavior.exp() * reference_kl("unbiased", current, ref, behavior, ones)).sum()
    (got,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    assert estimate.item() == pytest.approx(kl.item())
    assert got.tolist() == pytest.approx(wanted.tolist())
    on_policy = {
        form: torch.autograd.grad(
            (current.detach().exp() * reference_kl(form, current, ref, current.detach(), ones)).sum(),
            logits,
            retain_graph=True,
        )[0].tolist()
        for form in ("k1", "k2", "k3")
    }
    assert on_policy["k1"] == pytest.approx([0.0] * 7, abs=1e-12)
    assert on_policy["k2"] == pytest.approx(wanted.tolist())
    assert on_policy["k3"] != pytest.approx(wanted.tolist())


def test_each_aggregation_divides_by_what_it_is_given():
    values = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    sequences = Sequences(torch.tensor([0, 0, 0, 1, 1]), 2)
    counts = torch.tensor([3.0, 2.0], dtype=torch.float64)
    denominators = Denominators(tokens=10, sequences=4)

    def result(mode, horizon=None):
        return aggregate(values, mode, denominators, sequences, counts, horizon).item()

    assert result("token-mean") == pytest.approx(15 / 10)
    assert result("seq-mean-token-mean") == pytest.approx((2 + 4.5) / 4)
    assert result("seq-mean-token-sum") == pytest.approx(15 / 4)
    assert result("seq-mean-token-sum-norm", 8.0) == pytest.approx(15 / 4 / 8)


def test_interpolated_prox_moves_from_the_sampler_to_the_policy_with_age():
    behavior, current = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0, -2.0, -2.0])
    prox = interpolated_logprobs(current, behavior, torch.tensor([0, 1, 3]), torch.ones(3))
    assert prox.tolist() == pytest.approx([-1.0, -1.5, -1.75])


def test_bypass_clips_around_the_sampler(stale):
    bypass = AlgorithmConfig(preset="ppo")
    metrics = policy_loss(bypass, stale.current, None, stale.batch, stale.denominators).sums.finalise()
    assert metrics["mismatch/ratio_max"] == metrics["mismatch/ratio_min"] == 1.0
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(2.9))
