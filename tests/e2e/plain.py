"""Synchronous RL without any of this project's machinery: what η = 0 must give, bitwise."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from torch import Tensor

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.rollout import make_rollout
from slime_async.config import Config
from slime_async.learner.batch import prepare_batch
from slime_async.learner.trainer import Trainer
from slime_async.protocol import Reservation
from slime_async.queue import TaskStream
from slime_async.trajectory import Trajectory, WeightId


def variety(_content: Any, answer: str, _finish_reason: str) -> float:
    """A reward that an untrained model's answers differ in."""
    return len(set(answer)) / 7


def generate_then_train(config: Config, scratch: Path) -> dict[str, Tensor]:
    """The weights after ``run.steps`` batches."""
    trainer, tasks = Trainer.build(config, Path(config.model.path)), TaskStream.from_config(config)
    for version in range(config.run.steps):
        trainer.save_hf(scratch)
        batch = asyncio.run(generate(config, scratch, tasks, version))
        trainer.train_policy(prepare_batch(batch, version, config).sequences, version)
    weights = {name: tensor.detach().clone() for name, tensor in trainer.export()}
    trainer.close()
    return weights


async def generate(config: Config, weights: Path, tasks: TaskStream, version: int) -> list[Trajectory]:
    """One batch of complete groups from the checkpoint ``weights``."""
    slots, context = config.actor.max_running_requests, config.sampling.max_context_tokens
    engine = EmbeddedEngine(weights, slots=slots, max_context=context, fixed_slots=True, weights=WeightId(1, version))
    rollout = make_rollout(config, weights, engine)
    tasks.declare_sources(rollout.source_sizes)
    await engine.start()
    runs = []
    for _ in range(config.batch.groups):
        task = tasks.peek()
        assert task is not None
        tasks.advance(task.source)
        runs += [rollout.run(Reservation(task, sample, 0)) for sample in range(config.batch.group_size)]
    batch = [trajectory for trajectory in await asyncio.gather(*runs) if isinstance(trajectory, Trajectory)]
    await engine.close()
    return batch
