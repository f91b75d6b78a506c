"""Evaluation of one checkpoint in one process, through the same episodes and rewards as training."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

from slime_async.actors.engine import Engine, EngineError
from slime_async.actors.rollout import Rollout, make_rollout
from slime_async.config.schema import Config
from slime_async.protocol import SOLVED, Reservation
from slime_async.telemetry.progress import Progress, silent
from slime_async.trajectory import TaskRef, Trajectory


@dataclass(frozen=True, slots=True)
class EvaluationSummary:
    """Result of ``tasks`` tasks, one sample each."""

    accuracy: float
    """Share of all tasks with a reward of at least 1; a failed episode is not correct"""
    mean_reward: float
    """Over the episodes that gave one; NaN when none did"""
    failed: int
    """Episodes that gave no result"""
    tasks: int


async def evaluate_checkpoint(
    config: Config, checkpoint: Path, source: str, num_tasks: int, engine: Engine, on_progress: Progress = silent
) -> EvaluationSummary:
    """Evaluate on ``engine``, made for ``checkpoint`` and not yet started; it is closed when this returns.

    Raises ``ValueError`` for what the configuration names and does not exist, ``EngineError`` when the engine does not
    start or loads no weights.
    """
    rollout = make_rollout(config, checkpoint, engine)
    try:
        await engine.start()
        if (await engine.status()).weights is None:
            raise EngineError(f"engine {engine.engine_id} holds no weights: build it with those of {checkpoint}")
        return await evaluate_source(rollout, source, num_tasks, config.actor.slots, on_progress)
    finally:
        await rollout.close()
        await engine.close()


async def evaluate_source(
    rollout: Rollout, source: str, num_tasks: int, slots: int, on_progress: Progress = silent
) -> EvaluationSummary:
    """Play the first ``num_tasks`` tasks of ``source`` once each, at most ``slots`` at a time.

    A source that holds fewer is played as a whole. Raises ``ValueError`` when there is no such source.
    """
    sizes = rollout.source_sizes
    if source not in sizes:
        raise ValueError(f"no source {source!r} to evaluate: the configuration has {sorted(sizes)}")
    if num_tasks < 1:
        raise ValueError(f"num_tasks = {num_tasks}: evaluate at least one task")
    free, total, done = asyncio.Semaphore(slots), min(num_tasks, sizes[source]), itertools.count(1)

    async def play(index: int) -> float | None:
        async with free:
            result = await rollout.run(Reservation(TaskRef(index, source, index), 0, 0, evaluation=source))
        on_progress(next(done), total)
        return result.reward if isinstance(result, Trajectory) else None

    async with asyncio.TaskGroup() as group:
        episodes = [group.create_task(play(index)) for index in range(total)]
    return summarize([episode.result() for episode in episodes])


def summarize(rewards: list[float | None]) -> EvaluationSummary:
    """From one entry per task, None where the episode failed."""
    given = [reward for reward in rewards if reward is not None]
    return EvaluationSummary(
        accuracy=sum(reward >= SOLVED for reward in given) / len(rewards),
        mean_reward=statistics.fmean(given) if given else float("nan"),
        failed=len(rewards) - len(given),
        tasks=len(rewards),
    )
