from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slime_async.config import Config
from slime_async.learner.batch import prepare_batch
from slime_async.trajectory import Trajectory, VersionSpan, WeightId
from tests.transport.examples import make_trajectory

ETA = 2
TRAINED = 10
"""The version that the batches here train"""


def make_config(*, on_stale: str = "mask", deterministic: bool = False, **algorithm: Any) -> Config:
    return Config.model_validate(
        {
            "batch": {"group_size": 2, "groups": 2},
            "staleness": {"max_staleness": ETA, "on_stale": on_stale},
            "algorithm": algorithm,
            "run": {"deterministic": deterministic},
        }
    )


def sampled_by(*versions: int, serial: int = 0, sample: int = 0, reward: float = 0.0) -> Trajectory:
    """Two prompt tokens, then one sampled token of each version."""
    n = 2 + len(versions)
    return make_trajectory(
        serial,
        sample,
        token_ids=np.arange(n, dtype=np.int32),
        loss_mask=np.array([0, 0, *[1] * len(versions)], np.uint8),
        behavior_logprobs=np.full(n, -1, np.float32),
        spans=tuple(VersionSpan(2 + i, WeightId(1, v)) for i, v in enumerate(versions)),
        reward=reward,
    )


def group(serial: int, *rewards: float, version: int = TRAINED) -> list[Trajectory]:
    return [sampled_by(version, version, serial=serial, sample=i, reward=r) for i, r in enumerate(rewards)]


def test_advantages_compare_a_trajectory_with_its_own_group() -> None:
    batch = [*group(0, 1, 0), *group(1, 5, 5)]
    prepared = prepare_batch(batch, TRAINED, make_config(advantage="grpo-no-std"))
    assert [s.advantages for s in prepared.sequences] == [0.5, -0.5, 0.0, 0.0]
    assert [s.group for s in prepared.sequences] == [0, 0, 1, 1]


def test_tokens_eta_versions_old_train_and_older_ones_are_masked() -> None:
    old = sampled_by(TRAINED - ETA - 1, TRAINED - ETA, TRAINED - 1, TRAINED)
    prepared = prepare_batch([old, sampled_by(TRAINED, sample=1)], TRAINED, make_config())
    sequence = prepared.sequences[0]
    assert sequence.weight_mask.tolist() == [0, 0, 0, 1, 1, 1]
    assert sequence.loss_mask.tolist() == [0, 0, 1, 1, 1, 1]  # the denominators count the masked token
    assert np.asarray(sequence.staleness).tolist() == [0, 0, ETA + 1, ETA, 1, 0]
    assert prepared.metrics["tokens_masked_as_stale"] == 1
    assert prepared.metrics["staleness_max"] == ETA
    assert prepared.metrics["staleness_mean"] == (ETA + 1 + 0 + 0) / 4


@pytest.mark.parametrize("on_stale", ["train", "wait", "drop"])
def test_only_the_mask_policy_masks(on_stale: str) -> None:
    old = [sampled_by(0, 0, sample=i) for i in range(2)]
    prepared = prepare_batch(old, TRAINED, make_config(on_stale=on_stale))
    assert [s.weight_mask.tolist() for s in prepared.sequences] == [[0, 0, 1, 1]] * 2
    assert prepared.metrics["tokens_masked_as_stale"] == 0
    assert prepared.metrics["staleness_max"] == TRAINED


def test_a_wholly_stale_trajectory_keeps_its_reward_and_its_place() -> None:
    batch = [sampled_by(0, reward=1.0), sampled_by(TRAINED, sample=1, reward=0.0)]
    prepared = prepare_batch(batch, TRAINED, make_config(advantage="grpo-no-std"))
    assert [s.advantages for s in prepared.sequences] == [0.5, -0.5]
    assert not prepared.sequences[0].weight_mask.any()
    assert prepared.metrics["trajectories"] == 1
    assert prepared.metrics["reward_mean"] == 0.5


def test_a_batch_of_only_stale_tokens_has_finite_metrics() -> None:
    prepared = prepare_batch([sampled_by(0), sampled_by(0, sample=1)], TRAINED, make_config())
    assert prepared.metrics["tokens_trained"] == 0
    assert all(np.isfinite(value) for value in prepared.metrics.values())


def test_metrics_describe_the_batch() -> None:
    batch = [*group(0, 1, 0), *group(1, 1, 1), sampled_by(8, 9, 10, serial=2), sampled_by(9, serial=2, sample=1)]
    metrics = prepare_batch(batch, TRAINED, make_config()).metrics
    assert metrics == {
        "reward_mean": 0.5,
        "reward_std": 0.5,
        "groups_with_equal_rewards": 2,
        "trajectories": 6,
        "truncated_trajectories": 0,
        "batch_tokens": 4 * 4 + 5 + 3,
        "tokens_trained": 12,
        "sampled_tokens": 12,
        "answer_tokens_mean": 2,
        "staleness_mean": (2 + 1 + 1) / 12,
        "staleness_max": 2,
        "tokens_masked_as_stale": 0,
        "mixed_version_trajectories": 1,
        "staleness/0": 9,
        "staleness/1": 2,
        "staleness/2": 1,
    }


def test_a_deterministic_run_sorts_its_batches() -> None:
    batch = [*reversed(group(1, 0, 1)), *reversed(group(0, 2, 3))]
    ordered = prepare_batch(batch, TRAINED, make_config(deterministic=True)).sequences
    as_they_came = prepare_batch(batch, TRAINED, make_config()).sequences
    assert [s.group for s in ordered] == [0, 0, 1, 1]
    assert [s.group for s in as_they_came] == [1, 1, 0, 0]


@pytest.mark.parametrize("kept", [slice(0, 3), slice(1, 4), slice(1, 3), slice(0, 1)])
def test_incomplete_groups_are_refused(kept: slice) -> None:
    with pytest.raises(ValueError, match=r"a batch holds incomplete groups: tasks \[.*batch.group_size"):
        prepare_batch([*group(0, 1, 0), *group(1, 1, 0)][kept], TRAINED, make_config())
