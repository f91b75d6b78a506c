"""Training on one rank: objectives, minibatches, what is skipped, and the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from layout_job import train_sequences
from tiny_checkpoints import ARCHITECTURES
from transformers import AutoModelForCausalLM

from slime_async.learner.sequences import split_minibatches
from slime_async.learner.trainer import Trainer, TrainSequence

MakeTrainer = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.export()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    return [p.main_grad.clone() for p in trainer.model.parameters()]


def on_policy(trainer: Trainer, sequences: list[TrainSequence]) -> list[TrainSequence]:
    logprobs = trainer.logprobs([s.token_ids for s in sequences])
    return [replace(s, behavior_logprobs=p) for s, p in zip(sequences, logprobs, strict=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supervised_gradients_equal_those_of_transformers(
    architecture: str, make_trainer: MakeTrainer, checkpoints: Callable[[str], Any]
) -> None:
    trainer = make_trainer(architecture, learner={"clip_grad": 0.0, "microbatch_tokens": 40})
    batch = [(s.token_ids, s.loss_mask) for s in train_sequences()]
    model = AutoModelForCausalLM.from_pretrained(checkpoints(architecture), dtype=torch.float32)
    counted = sum(int(mask[1:].sum()) for _, mask in batch)
    expected = torch.zeros(())
    for ids, mask in ((torch.from_numpy(i).long(), torch.from_numpy(m)) for i, m in batch):
        logprobs = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        expected = expected - (logprobs * mask[1:]).sum() / counted
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    result = trainer.train_supervised(batch, 1e-3)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert result.tokens_counted == counted


def test_supervised_training_learns_a_sequence(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    batch = [(np.arange(12, dtype=np.int32), np.ones(12, dtype=np.uint8))]
    losses = [trainer.train_supervised(batch, 1e-2).loss for _ in range(20)]
    assert losses[-1] < 0.2 * losses[0]


def test_policy_training_makes_good_sequences_likelier(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(learner={"learning_rate": 1e-3})
    sequences = [replace(s, weight_mask=np.ones_like(s.weight_mask)) for s in train_sequences()]
    before = on_policy(trainer, sequences)
    trainer.train_policy(before, 0)
    after = trainer.logprobs([s.token_ids for s in before])
    gain = sum(
        float(np.sum((new - s.behavior_logprobs) * s.loss_mask) * s.advantages)
        for s, new in zip(before, after, strict=True)
    )
    assert gain > 0


@pytest.mark.parametrize(
    "algorithm",
    [{}, {"preset": "gspo"}, {"preset": "cispo"}, {"preset": "topr"}, {"preset": "tis"}, {"preset": "m2po"}],
    ids=lambda a: a.get("preset", "default"),
)
def test_skipping_sequences_without_advantage_leaves_the_gradient_as_it_is(
    algorithm: dict[str, Any], make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = train_sequences()
    skipping = make_trainer(algorithm=algorithm)
    short = skipping.train_policy(sequences, 0)
    expected = gradients(skipping)
    monkeypatch.setattr(TrainSequence, "has_advantage", True)
    full_trainer = make_trainer(algorithm=algorithm)
    full = full_trainer.train_policy(sequences, 0)
    assert short.tokens_computed < full.tokens_computed == sum(len(s.token_ids) for s in sequences)
    assert short.tokens_counted == full.tokens_counted
    assert short.loss == pytest.approx(full.loss, rel=1e-5, abs=1e-7)
    for one, other in zip(expected, gradients(full_trainer), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_advantage_changes_nothing(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    result = trainer.train_policy([replace(s, advantages=0.0) for s in train_sequences()], 0)
    assert same_weights(weights(trainer), before)
    assert (result.loss, result.grad_norm, result.tokens_computed) == (0.0, 0.0, 0)
    assert result.tokens_counted > 0


def test_with_an_entropy_term_nothing_is_skipped(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(algorithm={"entropy_coef": 0.01})
    sequences = train_sequences()
    assert trainer.train_policy(sequences, 0).tokens_computed == sum(len(s.token_ids) for s in sequences)


def test_the_first_of_several_steps_has_a_policy_ratio_of_one_and_the_others_have_not(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(learner={"optimizer_steps": 2, "learning_rate": 1e-2})
    several = trainer.train_policy(on_policy(trainer, train_sequences()), 0).metrics
    assert several["mismatch/abs_logp_diff_max"] < 1e-5  # π_prox is from before the first step: it stays μ here
    assert several["policy/abs_logp_diff_max"] > 1e-3
    once = make_trainer(learner={"learning_rate": 1e-2})
    assert once.train_policy(train_sequences(), 0).metrics["policy/abs_logp_diff_max"] == 0


def test_batch_statistics_do_not_depend_on_microbatches(make_trainer: MakeTrainer) -> None:
    algorithm = {"weight": "truncate", "weight_normalize": True}
    results = []
    for tokens in (20, 10_000):
        trainer = make_trainer(algorithm=algorithm, learner={"microbatch_tokens": tokens})
        results.append(trainer.train_policy(train_sequences(), 0))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)


def test_the_reference_policy_is_the_one_of_version_0(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(algorithm={"kl_coef": 0.1}, learner={"learning_rate": 1e-2})
    first = trainer.train_policy(train_sequences(), 0)
    assert first.metrics["loss/kl"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.train_policy(train_sequences(), 1).metrics["loss/kl"] > 1e-4


def test_a_resumed_run_with_kl_must_be_given_its_reference(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(algorithm={"kl_coef": 0.1})
    with pytest.raises(ValueError, match=r"call hold_reference\(\) before resuming"):
        trainer.train_policy(train_sequences(), 3)
    trainer.hold_reference()
    trainer.train_policy(train_sequences(), 3)


@pytest.mark.parametrize("options", [{}, {"use_distributed_optimizer": True}], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restoring_a_snapshot_repeats_the_continuation_bitwise(
    options: dict[str, Any], dtype: str, make_trainer: MakeTrainer
) -> None:
    trainer = make_trainer(megatron=options, model={"dtype": dtype}, learner={"warmup_steps": 5, "learning_rate": 1e-3})
    sequences = train_sequences()
    supervised = [(s.token_ids, s.loss_mask) for s in sequences]

    def go_on() -> tuple[list[float], dict[str, torch.Tensor]]:
        losses = [trainer.train_policy(sequences, v).loss for v in range(2)]
        return [*losses, trainer.train_supervised(supervised, 1e-3).loss], weights(trainer)

    fresh = trainer.snapshot_state()
    first = go_on()
    trained = trainer.snapshot_state()
    second = go_on()
    trainer.reset_optimizer(1e-2)
    trainer.train_supervised(supervised, 1e-2)
    for state, (losses, expected) in ((trained, second), (fresh, first), (trained, second)):
        trainer.restore_state(state)
        again = go_on()
        assert again[0] == losses
        assert same_weights(again[1], expected)


def test_a_reset_optimizer_steps_as_a_new_one(make_trainer: MakeTrainer, checkpoints: Callable[[str], Any]) -> None:
    sequences = train_sequences()
    trainer = make_trainer(learner={"learning_rate": 1e-3, "warmup_steps": 4})
    trainer.train_supervised([(s.token_ids, s.loss_mask) for s in sequences], 1e-2)
    trainer.model.weights.load(checkpoints("qwen3"))
    trainer.reset_optimizer(1e-3)
    rates = [trainer.train_policy(sequences, v).learning_rate for v in range(5)]
    after_reset = weights(trainer)
    fresh = make_trainer(learner={"learning_rate": 1e-3, "warmup_steps": 4})
    for version in range(5):
        fresh.train_policy(sequences, version)
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert same_weights(after_reset, weights(fresh))


def test_a_loaded_distributed_optimizer_counts_the_steps_of_each_parameter_apart(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(megatron={"use_distributed_optimizer": True})
    trainer.train_policy(train_sequences(), 0)
    distributed = trainer.model.optimizer.chained_optimizers[0]
    distributed.load_state_dict(distributed.state_dict())
    steps = [state["step"] for state in distributed.optimizer.state.values()]
    assert len({step.data_ptr() for step in steps}) == len(steps) > 1


def test_a_gradient_that_is_not_finite_stops_training(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    broken = [replace(s, advantages=float("nan")) for s in train_sequences()]
    with pytest.raises(FloatingPointError, match="the gradient's norm is nan"):
        trainer.train_policy(broken, 0)


def test_minibatches_are_whole_groups_in_order() -> None:
    assert split_minibatches([5, 5, 9, 9, 2, 2, 7], 2) == [[0, 1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match=r"2 groups cannot be split over learner\.optimizer_steps = 3"):
        split_minibatches([1, 1, 2], 3)


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="weight_mask has 1 entries for 3 tokens"):
        replace(train_sequences()[0], token_ids=np.zeros(3, np.int32), loss_mask=np.ones(3), weight_mask=np.ones(1))
