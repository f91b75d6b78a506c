"""Evaluation of one checkpoint in one process, through the same episodes and rewards as training."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from slime_async.actors.engine import Engine, EngineError
from slime_async.actors.rollout import Rollout, make_rollout
from slime_async.config.schema import Config
from slime_async.protocol import EvaluationResult, Reservation
from slime_async.telemetry.progress import Progress, silent
from slime_async.trajectory import TaskRef, Trajectory


async def evaluate_checkpoint(
    config: Config, checkpoint: Path, source: str, num_tasks: int, engine: Engine, on_progress: Progress = silent
) -> EvaluationResult:
    """Evaluate ``evaluation.samples`` answers per task on ``engine``, made for ``checkpoint`` and not yet started; it
    is closed when this returns.

    Raises ``ValueError`` for what the configuration names and does not exist, ``EngineError`` when the engine does not
    start or loads no weights.
    """
    rollout = make_rollout(config, checkpoint, engine)
    try:
        await engine.start()
        if (await engine.status()).weights is None:
            raise EngineError(f"engine {engine.engine_id} holds no weights: build it with those of {checkpoint}")
        samples = config.evaluation.samples
        return await evaluate_source(rollout, source, num_tasks, config.actor.slots, on_progress, samples)
    finally:
        await rollout.close()
        await engine.close()


async def evaluate_source(
    rollout: Rollout, source: str, num_tasks: int, slots: int, on_progress: Progress = silent, samples: int = 1
) -> EvaluationResult:
    """Play the first ``num_tasks`` tasks of ``source``, ``samples`` times each, at most ``slots`` episodes at a time.

    A source that holds fewer is played as a whole. Raises ``ValueError`` when there is no such source.
    """
    sizes = rollout.source_sizes
    if source not in sizes:
        raise ValueError(f"no source {source!r} to evaluate: the configuration has {sorted(sizes)}")
    if num_tasks < 1 or samples < 1:
        raise ValueError(f"num_tasks = {num_tasks}, samples = {samples}: evaluate at least one task, once")
    num_tasks = min(num_tasks, sizes[source])
    free, total, done = asyncio.Semaphore(slots), num_tasks * samples, itertools.count(1)

    async def play(index: int, sample: int) -> Trajectory | None:
        async with free:
            result = await rollout.run(Reservation(TaskRef(index, source, index), sample, 0, evaluation=source))
        on_progress(next(done), total)
        return result if isinstance(result, Trajectory) else None

    async with asyncio.TaskGroup() as group:
        episodes = [[group.create_task(play(index, k)) for k in range(samples)] for index in range(num_tasks)]
    answers = [[result for episode in task if (result := episode.result()) is not None] for task in episodes]
    given = [answer for task in answers for answer in task]
    return EvaluationResult(
        source,
        rewards=tuple(answer.reward for answer in given),
        failed=total - len(given),
        versions=tuple(sorted({version for answer in given for version in answer.tokens_by_version()})),
        counts=() if samples == 1 else tuple(len(task) for task in answers),
    )
