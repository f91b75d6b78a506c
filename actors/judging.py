"""Rewards and filters of whole groups: functions of the user's that see all answers to one task at once.

    def group_reward(group: Group) -> list[float]      task.group_reward: one reward per sample, in the place of its own
    def keep(group: Group) -> bool                      task.filter: whether to train on it; sees the new rewards

They run in a worker process of the hub, where groups come together, with limits of time and memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slime_async.actors.isolation import WorkerError, WorkerPool
from slime_async.actors.sources import load_source
from slime_async.actors.tokenizer import load_tokenizer
from slime_async.config.errors import ConfigError
from slime_async.config.schema import Config
from slime_async.objects import load_callable
from slime_async.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Sample:
    """One episode of a group."""

    answers: tuple[str, ...]
    """What the policy wrote, turn by turn, without special tokens"""
    transcript: str
    """Everything, special tokens included"""
    reward: float
    finish_reason: str
    sampled_tokens: int
    metrics: dict[str, float]

    @property
    def answer(self) -> str:
        """The last turn's"""
        return self.answers[-1]


@dataclass(frozen=True, slots=True)
class Group:
    """All episodes of one task."""

    content: Any
    """What the source holds"""
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(sample.reward for sample in self.samples)


class GroupJudge:
    """The hub's side: hands groups to worker processes."""

    def __init__(self, config: Config) -> None:
        self._config = config.model_dump_json()
        self._startup_timeout_s = config.actor.startup_timeout_s
        self._pool = WorkerPool(
            config.task.processes,
            memory_bytes=config.task.process_memory_bytes,
            timeout_s=config.task.process_timeout_s,
        )

    async def prepare(self) -> None:
        """Load functions, sources and tokenizer. Raises ``ConfigError`` for what is wrong with them, before the first
        group."""
        try:
            await self._pool.call(load_judge, self._config, timeout_s=self._startup_timeout_s)
        except WorkerError as error:
            raise ConfigError(f"groups cannot be judged: {error}") from error

    async def __call__(self, trajectories: Sequence[Trajectory]) -> tuple[list[float], bool]:
        """Rewards by sample, and whether to keep the group. Raises ``WorkerError``."""
        ref = trajectories[0].task
        samples = [
            {
                "token_ids": trajectory.token_ids,
                "loss_mask": trajectory.loss_mask,
                "reward": trajectory.reward,
                "finish_reason": trajectory.finish_reason,
                "metrics": dict(trajectory.metrics),
            }
            for trajectory in trajectories
        ]
        rewards, keep = await self._pool.call(judge_group, self._config, ref.source, ref.index, samples)
        return rewards, keep

    async def close(self) -> None:
        await self._pool.close()


def make_judge(config: Config) -> GroupJudge | None:
    """None where the configuration names neither ``task.group_reward`` nor ``task.filter``."""
    return GroupJudge(config) if config.task.group_reward or config.task.filter else None


# ------------------------------------------------------------------------------------------ in the worker process


def load_judge(config_json: str) -> None:
    """Everything that ``judge_group`` needs besides the group."""
    config, _ = _load(config_json)
    for key in ("group_reward", "filter"):
        if path := getattr(config.task, key):
            load_callable(path, f"task.{key}")
    _tokenizer(config.model.path)


def judge_group(
    config_json: str, source: str, index: int, samples: Sequence[dict[str, Any]]
) -> tuple[list[float], bool]:
    """Runs the configured functions on one group."""
    config, sources = _load(config_json)
    content = sources[source][index]
    tokenizer = _tokenizer(config.model.path)
    group = Group(content, tuple(_sample(tokenizer, sample) for sample in samples))
    if config.task.group_reward:
        given = load_callable(config.task.group_reward, "task.group_reward")(group)
        rewards = [float(reward) for reward in given]
        if len(rewards) != len(group.samples):
            raise ValueError(f"task.group_reward gave {len(rewards)} rewards for {len(group.samples)} samples")
        group = replace(group, samples=tuple(replace(s, reward=r) for s, r in zip(group.samples, rewards, strict=True)))
    keep = bool(load_callable(config.task.filter, "task.filter")(group)) if config.task.filter else True
    return list(group.rewards), keep


@functools.lru_cache(maxsize=1)
def _load(config_json: str) -> tuple[Config, dict[str, Any]]:
    config = Config.model_validate_json(config_json)
    return config, {name: load_source(source) for name, source in config.task.train.items()}


@functools.lru_cache(maxsize=1)
def _tokenizer(checkpoint: str) -> Any:
    return load_tokenizer(Path(checkpoint))


def _sample(tokenizer: Any, raw: dict[str, Any]) -> Sample:
    ids, mask = np.asarray(raw["token_ids"]), np.asarray(raw["loss_mask"]) != 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    turns = [ids[start:end] for start, end in edges.reshape(-1, 2)]
    return Sample(
        answers=tuple(str(tokenizer.decode(turn.tolist(), skip_special_tokens=True)) for turn in turns),
        transcript=str(tokenizer.decode(ids.tolist(), skip_special_tokens=False)),
        reward=raw["reward"],
        finish_reason=raw["finish_reason"],
        sampled_tokens=int(mask.sum()),
        metrics=raw["metrics"],
    )


def has_signal(group: Group) -> bool:
    """``task.filter = "slime_async.actors.judging:has_signal"``: rewards that differ, as in DAPO (arXiv 2503.14476).

    ``batch.drop_equal_rewards = true`` does the same without a process.
    """
    return len(set(group.rewards)) > 1
