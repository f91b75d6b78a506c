"""From a leased batch to what the trainer takes: advantages, staleness and its mask, and the numbers they show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slime_async.config import Config
from slime_async.correction import group_advantages
from slime_async.learner.trainer import TrainSequence
from slime_async.queue.staleness import stale_token_mask
from slime_async.trajectory import NOT_SAMPLED, Trajectory


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """One training batch and what is to be told about it before it is trained."""

    sequences: list[TrainSequence]
    metrics: dict[str, float]


def prepare_batch(trajectories: Sequence[Trajectory], train_version: int, config: Config) -> PreparedBatch:
    """Group-relative advantages over every reward; tokens beyond the bound keep their place in the denominators.

    Trajectories come as complete groups, a group's samples next to each other.
    """
    size = config.batch.group_size
    ordered = sorted(trajectories, key=lambda t: t.key) if config.run.deterministic else list(trajectories)
    tasks = [t.task.serial for t in ordered]
    if len(tasks) % size or any(len(set(tasks[i : i + size])) != 1 for i in range(0, len(tasks), size)):
        raise ValueError(f"a batch holds incomplete groups: tasks {tasks} are not runs of {size} (batch.group_size)")
    rewards = np.array([t.reward for t in ordered], dtype=np.float64).reshape(-1, size)
    advantages = group_advantages(config.algorithm, torch.from_numpy(rewards)).reshape(-1).numpy()
    masked = config.staleness.on_stale == "mask"
    sequences, trained_staleness, masked_tokens = [], [], 0
    ages: Counter[int] = Counter()
    for trajectory, advantage in zip(ordered, advantages, strict=True):
        versions = trajectory.token_versions()
        sampled = versions != NOT_SAMPLED
        # weights that were lost with a learner's rollback may be newer than the present ones: as fresh as can be
        staleness = np.where(sampled, np.maximum(train_version - versions, 0), 0)
        weight = stale_token_mask(versions, train_version, config.staleness.max_staleness) if masked else sampled
        weight_mask = np.asarray(weight, dtype=np.uint8)
        ages.update(staleness[sampled].tolist())
        masked_tokens += int(sampled.sum() - (weight_mask > 0).sum())
        trained_staleness.append(staleness[weight_mask > 0])
        sequences.append(
            TrainSequence(
                token_ids=trajectory.token_ids,
                loss_mask=trajectory.loss_mask,
                weight_mask=weight_mask,
                behavior_logprobs=trajectory.behavior_logprobs,
                advantages=float(advantage),
                staleness=staleness,
                group=trajectory.task.serial,
            )
        )
    staleness_of_tokens = np.concatenate(trained_staleness) if trained_staleness else np.zeros(0)
    lengths = np.array([int(t.loss_mask.sum()) for t in ordered])
    metrics = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "groups_with_equal_rewards": float((np.ptp(rewards, axis=1) == 0).sum()),
        "trajectories": float(sum(bool(s.weight_mask.any()) for s in sequences)),
        "batch_tokens": float(sum(len(t.token_ids) for t in ordered)),
        "tokens_trained": float(len(staleness_of_tokens)),
        "sampled_tokens": float(lengths.sum()),
        "answer_tokens_mean": float(lengths.mean()),
        "staleness_mean": float(staleness_of_tokens.mean()) if len(staleness_of_tokens) else 0.0,
        "staleness_max": float(staleness_of_tokens.max()) if len(staleness_of_tokens) else 0.0,
        "tokens_masked_as_stale": float(masked_tokens),
        "mixed_version_trajectories": float(sum(len(t.tokens_by_version()) > 1 for t in ordered)),
        **{f"staleness/{age}": float(ages[age]) for age in sorted(ages)},
    }
    return PreparedBatch(sequences, metrics)
