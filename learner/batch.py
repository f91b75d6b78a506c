"""From a leased batch to what the trainer takes: advantages, staleness and its mask, and the numbers they show."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from slime_async.branches import branches, is_plain
from slime_async.config import Config
from slime_async.correction import group_advantages
from slime_async.learner.credit import branch_advantages, rewards_of_tokens
from slime_async.learner.trainer import TrainSequence
from slime_async.protocol import Batch
from slime_async.queue.staleness import stale_token_mask
from slime_async.routing import routed_experts
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
    masked = config.staleness.on_stale == "mask"
    sequences, trained_staleness, masked_tokens, with_weight = [], [], 0, 0
    ages: Counter[int] = Counter()
    for trajectory, parts in zip(ordered, _advantages(ordered, rewards, config), strict=True):
        versions = trajectory.token_versions()
        sampled = versions != NOT_SAMPLED
        # weights that were lost with a learner's rollback may be newer than the present ones: as fresh as can be
        staleness = np.where(sampled, np.maximum(train_version - versions, 0), 0)
        weight = stale_token_mask(versions, train_version, config.staleness.max_staleness) if masked else sampled
        weight_mask = np.asarray(weight, dtype=np.uint8)
        ages.update(staleness[sampled].tolist())
        masked_tokens += int(sampled.sum() - (weight_mask > 0).sum())
        if trajectory.truncated and config.task.on_truncated == "mask":
            weight_mask = np.zeros_like(weight_mask)
        with_weight += bool(weight_mask.any())
        experts = routed_experts(trajectory)
        earned = rewards_of_tokens(trajectory) if config.has_critic else None
        trained_staleness.append(staleness[weight_mask > 0])
        sequences += [
            TrainSequence(
                token_ids=trajectory.token_ids[tokens],
                loss_mask=trajectory.loss_mask[tokens],
                weight_mask=weight_mask[tokens],
                behavior_logprobs=trajectory.behavior_logprobs[tokens],
                advantages=advantage,
                rewards=None if earned is None else earned[tokens],
                staleness=staleness[tokens],
                routed_experts=None if experts is None else experts[tokens],
                group=trajectory.task.serial,
            )
            for tokens, advantage in parts
        ]
    staleness_of_tokens = np.concatenate(trained_staleness) if trained_staleness else np.zeros(0)
    lengths = np.array([int(t.loss_mask.sum()) for t in ordered])
    truncated = Counter(t.finish_reason for t in ordered if t.truncated)
    metrics = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "groups_with_equal_rewards": float((np.ptp(rewards, axis=1) == 0).sum()),
        "trajectories": float(with_weight),
        "truncated_trajectories": float(truncated.total()),
        "batch_tokens": float(sum(len(t.token_ids) for t in ordered)),
        "tokens_trained": float(len(staleness_of_tokens)),
        "sampled_tokens": float(lengths.sum()),
        "answer_tokens_mean": float(lengths.mean()),
        "staleness_mean": float(staleness_of_tokens.mean()) if len(staleness_of_tokens) else 0.0,
        "staleness_max": float(staleness_of_tokens.max()) if len(staleness_of_tokens) else 0.0,
        "tokens_masked_as_stale": float(masked_tokens),
        "mixed_version_trajectories": float(sum(len(t.tokens_by_version()) > 1 for t in ordered)),
        **{f"truncated/{reason}": float(count) for reason, count in sorted(truncated.items())},
        **{f"staleness/{age}": float(ages[age]) for age in sorted(ages)},
    }
    return PreparedBatch(sequences, metrics | _environment_metrics(ordered))


def _environment_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The mean of each of the task's own numbers, over the trajectories that have it."""
    given: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, value in trajectory.metrics.items():
            given.setdefault(f"environment/{name}", []).append(value)
    return {name: float(np.mean(values)) for name, values in sorted(given.items())}


def judged(batch: Batch) -> Sequence[Trajectory]:
    """The trajectories with the rewards that count: those of the group's judge, where there is one."""
    if not batch.rewards:
        return batch.trajectories
    pairs = zip(batch.trajectories, batch.rewards, strict=True)
    return [dataclasses.replace(trajectory, reward=reward) for trajectory, reward in pairs]


def filtered(batch: Batch, groups: int) -> dict[str, float]:
    """What was generated besides this batch's ``groups`` and filtered out, and what failed, for the metrics."""
    return {
        "groups_filtered": float(batch.groups_filtered),
        "tokens_filtered": float(batch.tokens_filtered),
        "over_sampling": (groups + batch.groups_filtered) / groups,
        **{f"failed/{kind}": float(count) for kind, count in batch.episodes_failed.items()},
    }


def _advantages(
    trajectories: Sequence[Trajectory], rewards: NDArray[np.float64], config: Config
) -> list[list[tuple[slice, NDArray[np.float32] | float]]]:
    """Per trajectory its sequences, as slices of its columns, each with its advantage; ``rewards`` are [groups, n]."""
    if config.has_critic:  # the trainer has the values that advantages need
        return [[(branch.tokens, 0.0) for branch in branches(trajectory)] for trajectory in trajectories]
    if all(is_plain(trajectory) for trajectory in trajectories):
        plain = group_advantages(config.algorithm, torch.from_numpy(rewards)).reshape(-1).tolist()
        return [[(slice(None), float(advantage))] for advantage in plain]
    return [
        [(branch.tokens, advantage) for branch, advantage in parts] for parts in branch_advantages(config, trajectories)
    ]
