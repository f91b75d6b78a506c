"""Advantages from groups and from a critic."""

import pytest
import torch

from slime_async.config.algorithm import AlgorithmConfig
from slime_async.correction import group_advantages
from slime_async.correction.critic import gae, vtrace
from slime_async.correction.ratios import Sequences

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 1.0]], dtype=torch.float64)
SEQUENCES = Sequences(torch.tensor([0, 0, 0, 0, 1, 1, 1]), 2)
MASK = torch.tensor([0.0, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
TOKEN_REWARDS = torch.tensor([9.0, 0, 9, 1, 0.5, 0, 2], dtype=torch.float64)
VALUES = torch.tensor([9.0, 0.4, 9, 0.6, 0.1, 0.2, 0.3], dtype=torch.float64)


def advantages(estimator: str, rewards: torch.Tensor = REWARDS) -> torch.Tensor:
    return group_advantages(AlgorithmConfig(advantage=estimator), rewards)


def test_group_estimators_differ_in_baseline_and_scale():
    assert advantages("grpo-no-std")[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages("grpo")[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert advantages("rloo")[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert advantages("reinforce++").mean().item() == pytest.approx(0.0, abs=1e-12)
    assert advantages("reinforce++").std().item() == pytest.approx(1.0, rel=1e-5)
    baseline = advantages("reinforce++-baseline")
    assert baseline.mean(dim=1).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert baseline.std().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "grpo-no-std", "rloo", "reinforce++", "reinforce++-baseline"])
def test_rewards_that_agree_give_no_advantage_and_nothing_infinite(estimator):
    assert advantages(estimator, torch.ones(3, 4)).tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize(
    ("estimator", "rewards", "words"),
    [
        ("grpo", torch.tensor([[1.0, float("nan")]]), "a reward is nan"),
        ("rloo", torch.tensor([[1.0], [0.0]]), "batch.group_size ≥ 2"),
        ("grpo", torch.tensor([1.0, 0.0]), "one row per group"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(estimator, rewards, words):
    with pytest.raises(ValueError, match=words):
        advantages(estimator, rewards)


def test_a_single_trajectory_has_no_advantage():
    assert advantages("reinforce++", torch.ones(1, 1)).tolist() == [[0.0]]


def test_gae_runs_over_sampled_tokens_and_ends_with_the_episode():
    estimate = gae(TOKEN_REWARDS, VALUES, MASK, SEQUENCES, gamma=0.9, lam=0.5)
    last = 1.0 - 0.6
    first = 0.0 + 0.9 * 0.6 - 0.4 + 0.45 * last
    assert estimate.advantages[:4].tolist() == pytest.approx([0.0, first, 0.0, last])
    assert estimate.value_targets[:4].tolist() == pytest.approx([0.0, first + 0.4, 0.0, 1.0])


def test_a_cut_episode_is_bootstrapped():
    estimate = gae(TOKEN_REWARDS, VALUES, MASK, SEQUENCES, gamma=1.0, lam=1.0, bootstrap=torch.tensor([5.0, 0.0]))
    assert estimate.value_targets[[1, 3]].tolist() == pytest.approx([6.0, 6.0])
    assert estimate.value_targets[4:].tolist() == pytest.approx([2.5, 2.0, 2.0])


def test_on_policy_vtrace_is_the_lambda_return():
    ours = vtrace(torch.zeros(7, dtype=torch.float64), TOKEN_REWARDS, VALUES, MASK, SEQUENCES, gamma=0.9, lam=0.8)
    lambda_return = gae(TOKEN_REWARDS, VALUES, MASK, SEQUENCES, gamma=0.9, lam=0.8).value_targets
    assert ours.value_targets.tolist() == pytest.approx(lambda_return.tolist())


def test_vtrace_matches_the_recursion_written_out():
    logs = torch.tensor([0.0, -0.5, 0, 0.7, 0.2, -1.0, -0.1], dtype=torch.float64)
    estimate = vtrace(logs, TOKEN_REWARDS, VALUES, MASK, SEQUENCES, gamma=0.9, rho_max=1.5, c_max=1.0)
    target_next = value_next = 0.0
    for t in (6, 5, 4):
        r = logs[t].exp().item()
        rho, c = min(r, 1.5), min(r, 1.0)
        delta = rho * (TOKEN_REWARDS[t].item() + 0.9 * value_next - VALUES[t].item())
        advantage = rho * (TOKEN_REWARDS[t].item() + 0.9 * target_next - VALUES[t].item())
        target = VALUES[t].item() + delta + 0.9 * c * (target_next - value_next)
        assert estimate.value_targets[t].item() == pytest.approx(target)
        assert estimate.advantages[t].item() == pytest.approx(advantage)
        target_next, value_next = target, VALUES[t].item()


@pytest.mark.parametrize("estimator", [gae, lambda *a: vtrace(torch.zeros(7), *a)])
def test_nothing_sampled_gives_zeros(estimator):
    estimate = estimator(TOKEN_REWARDS, VALUES, torch.zeros(7), SEQUENCES)
    assert not estimate.advantages.any()
    assert not estimate.value_targets.any()
