"""The critic: GAE from its own values, the clipped value loss, and its head in training and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_job import train_sequences
from test_layouts import TWO_RANKS, compare

from slime_async.config.schema import CriticConfig
from slime_async.correction.critic import value_loss
from slime_async.learner.critic import with_estimates
from slime_async.learner.sequences import TrainSequence
from slime_async.learner.trainer import Trainer

GAE: dict[str, Any] = {
    "algorithm": {"advantage": "gae"},
    "learner": {"learning_rate": 1e-2, "microbatch_tokens": 48},
}


def rewarded() -> list[TrainSequence]:
    """Episodes that earn what their first token says: a critic can know it."""
    sequences = []
    for sequence in train_sequences(count=16):
        rewards = np.zeros(len(sequence.token_ids), dtype=np.float32)
        rewards[-1] = sequence.token_ids[0] % 2
        sequences.append(dataclasses.replace(sequence, rewards=rewards))
    return sequences


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (1.0, 1.0, 2.0, 0.5, 0.0),
        (1.9, 1.0, 2.0, 0.5 * 0.8**2, 1.0),  # further than the clip lets count
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, 0.0),
        (0.0, 1.0, 2.0, 2.0, 0.0),  # in the wrong direction: it counts whole
    ],
)
def test_a_value_that_moves_too_far_at_once_gains_nothing(
    value: float, old: float, target: float, loss: float, clipped: float
) -> None:
    moving = torch.tensor([value], requires_grad=True)
    result = value_loss(moving, torch.tensor([old]), torch.tensor([target]), 0.2)
    assert result.loss.item() == pytest.approx(loss)
    assert result.clipped.item() == clipped
    result.loss.sum().backward()
    assert moving.grad is not None
    assert (moving.grad.item() == 0.0) == bool(clipped)


def test_without_values_and_discount_the_advantage_is_the_return() -> None:
    config = CriticConfig(gae_lambda=1.0, normalize=False)
    sequences = rewarded()
    estimated, metrics = with_estimates(config, sequences, [np.zeros(len(s.token_ids), np.float32) for s in sequences])
    for before, after in zip(sequences, estimated, strict=True):
        sampled = before.loss_mask.astype(bool)
        sampled[0] = False  # nothing predicts the first token
        expected = np.where(sampled, before.token_ids[0] % 2, 0.0)
        np.testing.assert_allclose(after.advantages, expected)
        np.testing.assert_allclose(after.value_targets, expected)
    assert metrics["critic/value_mean"] == 0.0
    assert metrics["critic/explained_variance"] == 0.0


def test_normalised_advantages_have_mean_0_and_standard_deviation_1() -> None:
    values = [np.random.default_rng(i).normal(size=len(s.token_ids)) for i, s in enumerate(rewarded())]
    estimated, _ = with_estimates(CriticConfig(), rewarded(), [v.astype(np.float32) for v in values])
    sampled = np.concatenate([np.asarray(s.advantages)[1:][s.loss_mask[1:] > 0] for s in estimated])
    assert sampled.mean() == pytest.approx(0.0, abs=1e-5)
    assert sampled.std(ddof=1) == pytest.approx(1.0, abs=1e-3)


def test_the_critic_learns_what_episodes_earn(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(**GAE, critic={"loss_coef": 1.0, "clip": None})
    metrics = [trainer.train_policy(rewarded(), version).metrics for version in range(30)]
    assert metrics[0]["critic/value_mean"] == 0.0, "the head begins at nothing"
    assert metrics[-1]["critic/loss"] < metrics[0]["critic/loss"] / 4
    assert metrics[-1]["critic/explained_variance"] > 0.5


def test_a_head_alone_leaves_the_policy_as_it_is(make_trainer: Callable[..., Trainer]) -> None:
    weights = []
    for coefficient in (0.1, 10.0):
        critic = {"loss_coef": coefficient, "train_trunk": False, "normalize": False}
        trainer = make_trainer(**GAE | {"learner": {"clip_grad": 0.0}}, critic=critic)
        trainer.train_policy(rewarded(), 0)
        weights.append(dict(trainer.export()))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name])


def test_export_and_checkpoint_know_the_head(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(**GAE)
    assert all("value" not in name for name, _ in trainer.export())
    for version in range(2):
        trainer.train_policy(rewarded(), version)
    write, progress = trainer.begin_checkpoint(_empty(tmp_path)), trainer.progress
    assert write.is_over(60.0)
    assert write.error is None
    write.finish()
    straight = trainer.train_policy(rewarded(), 2)
    resumed = make_trainer(**GAE)
    resumed.load_checkpoint(tmp_path / "state", progress, same_layout=True)
    assert resumed.train_policy(rewarded(), 2) == straight


def _empty(directory: Path) -> Path:
    (directory / "state").mkdir()
    return directory / "state"


@pytest.mark.slow
def test_a_critic_trains_in_every_layout_as_in_one_rank(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    compare(2, list(TWO_RANKS.values()), checkpoints("qwen3"), tmp_path, advantage="gae")
