"""One cell: generation, queue and training in one process, in lockstep, on the real parts."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.staleness_sweep.cells import Cell, Protocol, cell_config, warm_start_config
from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.evaluate import evaluate_source
from slime_async.actors.rollout import Rollout, RolloutFailure, make_rollout
from slime_async.cli.prepare import prepare_model
from slime_async.config import Config
from slime_async.config.schema import WeightsConfig
from slime_async.learner.batch import prepare_batch
from slime_async.learner.snapshots import Snapshots
from slime_async.learner.trainer import Trainer
from slime_async.learner.warm_start import warm_start
from slime_async.protocol import Reservation
from slime_async.queue import LeasedBatch, QueueLimits, TaskStream, TrajectoryMeta, TrajectoryQueue
from slime_async.trajectory import Trajectory, TrajectoryKey, WeightId
from slime_async.transport.weight_group import WeightGroup, host_group

INCARNATION = 1
ACTOR = "in-process"
SOURCE = "held-out"
"""The demo's evaluation source"""
GROUP_TIMEOUT_S = 60.0

KEPT_METRICS = (
    "mismatch/k3",
    "mismatch/ess",
    "mismatch/abs_logp_diff_max",
    "policy/clip_fraction",
    "correction/rejected_fraction",
    "correction/trained_fraction",
    "weight/mean",
    "loss/entropy",
    "tokens_trained",
    "grad_norm",
)
"""Averaged over the batches of full staleness, and reported with the cell"""


@dataclass(slots=True)
class CellResult:
    """What one cell leaves behind."""

    accuracy: float = 0.0
    """Held-out, sampled, after the last step; 0 after a loss that was not finite"""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(steps trained, held-out accuracy)"""
    sampled_tokens: int = 0
    """Trained on, in all"""
    batches_at_full_staleness: int = 0
    diverged_at: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def warm_started(seed: int, protocol: Protocol, directory: Path) -> Path:
    """The checkpoint that all cells of ``seed`` start from; made at first need, whole or not at all."""
    checkpoint = directory / f"warm-start-seed{seed}-steps{protocol.warm_start_steps}"
    if checkpoint.exists():
        return checkpoint
    fresh, unfinished = (directory / f"{checkpoint.name}.{part}-{os.getpid()}" for part in ("fresh", "unfinished"))
    config = prepare_model(warm_start_config(seed, protocol), fresh)
    with _trainer(config, Path(config.model.path)) as trainer:
        warm_start(config, trainer, directory, lambda *_: None)
        trainer.save_hf(unfinished)
    shutil.rmtree(fresh)
    unfinished.rename(checkpoint)
    return checkpoint


def run_cell(cell: Cell, protocol: Protocol, directory: Path) -> CellResult:
    """Train and evaluate one cell. Raises ``RuntimeError`` when a batch's staleness is not the cell's."""
    torch.set_num_threads(1)
    begun = time.monotonic()
    checkpoint = warm_started(cell.seed, protocol, directory)
    config = cell_config(cell, protocol, checkpoint)
    with _trainer(config, checkpoint) as trainer:
        result = asyncio.run(_Lockstep(config, trainer, checkpoint).run(protocol))
    result.seconds = time.monotonic() - begun
    return result


@contextmanager
def _trainer(config: Config, checkpoint: Path) -> Iterator[Trainer]:
    trainer = Trainer.build(config, checkpoint)
    try:
        yield trainer
    finally:
        trainer.close()


class _Lockstep:
    """Generates all that the queue grants, then trains one batch, then publishes; again."""

    def __init__(self, config: Config, trainer: Trainer, checkpoint: Path) -> None:
        self._config = config
        self._trainer = trainer
        self._engine = EmbeddedEngine(
            checkpoint, slots=config.actor.max_running_requests, max_context=config.sampling.max_context_tokens
        )
        self._rollout: Rollout = make_rollout(config, checkpoint, self._engine)
        self._queue = TrajectoryQueue(QueueLimits.from_config(config), TaskStream.from_config(config))
        self._queue.declare_sources(self._rollout.source_sizes)
        self._queue.learner_joined(INCARNATION, 0, time.monotonic())
        self._payloads: dict[TrajectoryKey, Trajectory] = {}
        self._snapshots = Snapshots(trainer.manifest(), trainer.device, WeightsConfig().buffer_bytes)
        self._left_to_grant = config.run.steps * config.batch.trajectories

    async def run(self, protocol: Protocol) -> CellResult:
        result, kept = CellResult(), dict[str, list[float]]()
        spec, store = host_group("staleness-sweep", 0, 2, "gloo", GROUP_TIMEOUT_S)
        await self._engine.start()
        try:
            joining = asyncio.create_task(self._engine.join_weight_group(spec, 1))
            group = await asyncio.to_thread(WeightGroup.create, spec, 0)
            await joining
            del store
            await self._publish(group, 0)
            result.curve.append((0, await self._evaluate(protocol.curve_tasks)))
            for version in range(self._config.run.steps):
                metrics = await self._step(version)
                if not math.isfinite(metrics["loss"]):
                    result.diverged_at = version
                    break
                await self._publish(group, version + 1)
                result.sampled_tokens += int(metrics["sampled_tokens"])
                if version >= self._config.staleness.max_staleness:
                    result.batches_at_full_staleness += 1
                    for name in KEPT_METRICS:
                        kept.setdefault(name, []).append(metrics.get(name, 0.0))
                if (version + 1) % protocol.evaluate_every == 0:
                    result.curve.append((version + 1, await self._evaluate(protocol.curve_tasks)))
            else:
                result.accuracy = await self._evaluate(protocol.final_tasks)
            group.close()
        finally:
            await self._engine.close()
        result.metrics = {name: statistics.fmean(values) for name, values in kept.items()}
        return result

    async def _step(self, version: int) -> dict[str, float]:
        """Train ``version``'s batch."""
        while reservations := self._queue.grant(ACTOR, self._left_to_grant, time.monotonic()):
            self._left_to_grant -= len(reservations)
            await asyncio.gather(*(self._play(reservation) for reservation in reservations))
        leased = self._queue.lease(INCARNATION, version, time.monotonic())
        if not isinstance(leased, LeasedBatch):
            raise RuntimeError(f"no batch for version {version}: {leased.reason}")
        batch = prepare_batch([self._payloads.pop(key) for key in leased.keys], version, self._config)
        expected = min(version, self._config.staleness.max_staleness)
        if not leased.staleness.oldest == leased.staleness.newest == expected:
            raise RuntimeError(f"batch {version} has staleness {leased.staleness.histogram}, not exactly {expected}")
        result = self._trainer.train_policy(batch.sequences, version)
        self._queue.commit(INCARNATION, version, time.monotonic())
        self._queue.make_durable(INCARNATION, version + 1)
        return {**batch.metrics, **result.metrics, "loss": result.loss, "grad_norm": result.grad_norm}

    async def _play(self, reservation: Reservation) -> None:
        outcome = await self._rollout.run(reservation)
        if isinstance(outcome, RolloutFailure):
            raise RuntimeError(f"an episode failed: {outcome.reason}")
        self._payloads[outcome.key] = outcome
        size_bytes = outcome.token_ids.nbytes + outcome.loss_mask.nbytes + outcome.behavior_logprobs.nbytes
        self._queue.deliver(TrajectoryMeta.of(outcome, size_bytes), ACTOR, time.monotonic())

    async def _publish(self, group: WeightGroup, version: int) -> None:
        """Nothing is being generated, so nothing has to pause."""
        snapshot = self._snapshots.begin(WeightId(INCARNATION, version))
        self._snapshots.fill(snapshot, self._trainer.export)
        receiving = asyncio.create_task(self._engine.receive_weights(snapshot.manifest, snapshot.weights))
        names = (tensor.name for tensor in snapshot.manifest.tensors)
        await asyncio.to_thread(group.send, list(zip(names, snapshot.tensors, strict=True)))
        await receiving
        self._queue.publish(INCARNATION, version, time.monotonic())

    async def _evaluate(self, tasks: int) -> float:
        return (await evaluate_source(self._rollout, SOURCE, tasks, self._config.actor.slots)).accuracy
