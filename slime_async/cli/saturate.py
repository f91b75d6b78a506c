"""``python -m slime_async.cli.saturate SIDE CONFIG DIRECTORY``: one side of a run alone, for the benchmark.

==========  =========================================================  ===============================================
SIDE        does                                                       writes into DIRECTORY
==========  =========================================================  ===============================================
warm-start  the supervised phase, once for all modes                   a checkpoint, ``start``
engine      plays the run's own episodes, as many at once as it can    ``saturated-engine.json``, ``episodes.json``
learner     the training loop on batches like ``episodes.json``,       ``saturated-learner.json``
            from memory
==========  =========================================================  ===============================================
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from slime_async.bench.saturated import EngineRate, SaturatedEngine, SaturatedLearner
from slime_async.config import Config, load_config
from slime_async.protocol import Batch, Reservation
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId

if TYPE_CHECKING:
    from slime_async.actors.engine import Engine
    from slime_async.actors.rollout import Rollout
    from slime_async.learner.trainer import Trainer

EPISODES = "episodes.json"
START = "start"
SPARE = 2.0
"""Episodes over what an engine decodes at once, so that it is always full"""
SETTLE_FRACTION = 0.5
"""Of a measurement's time, spent beforehand at the same load"""
POLL_S = 0.05
WARMUP_BATCHES = 1


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m slime_async.cli.saturate", description=__doc__)
    parser.add_argument("side", choices=("warm-start", "engine", "learner"))
    parser.add_argument("config", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--url", default="", help="of an SGLang server that runs")
    parsed = parser.parse_args(arguments)
    config = load_config(parsed.config)
    if parsed.side == "warm-start":
        supervise(config, parsed.directory)
        return 0
    if parsed.side == "engine":
        result: SaturatedEngine | SaturatedLearner | None = asyncio.run(
            saturate_engine(config, parsed.directory, parsed.url)
        )
    else:
        result = saturate_learner(config, parsed.directory)
    if result is not None:
        (parsed.directory / f"saturated-{parsed.side}.json").write_text(json.dumps(result.to_plain()))
    return 0


def supervise(config: Config, directory: Path) -> None:
    """Every mode begins from these weights."""
    import torch

    from slime_async.learner.trainer import Trainer
    from slime_async.learner.warm_start import warm_start

    torch.set_num_threads(config.learner.threads)
    trainer = Trainer.build(config, Path(config.model.path))
    warm_start(config, trainer, directory, lambda *_: None)
    trainer.save_hf(directory / START)


# ------------------------------------------------------------------------------------------------------------- engine


async def saturate_engine(config: Config, directory: Path, url: str) -> SaturatedEngine:
    """Tokens per second of one engine at several loads, the last of them beyond what it decodes at once."""
    from slime_async.actors.rollout import make_rollout

    checkpoint = Path(config.model.path)
    engine = make_engine(config, url)
    player = _Player(config, make_rollout(config, checkpoint, engine))  # before the engine has a connection to lose
    await asyncio.wait_for(engine.start(), config.actor.startup_timeout_s)
    try:
        full = min(config.actor.slots, config.actor.max_running_requests)
        rates = []
        for episodes in sorted({1, max(1, full // 8), max(1, full // 2), int(full * SPARE)}):
            rates.append(await _rate(player, engine, episodes, config.bench.saturated_s, last=episodes > full))
    finally:
        await engine.close()
    episodes_played = player.complete_groups()
    (directory / EPISODES).write_text(json.dumps(episodes_played))
    played = [episode for group in episodes_played for episode in group]
    return SaturatedEngine(
        rates=tuple(sorted(rates, key=lambda rate: rate.running)),
        tokens_per_sample=sum(sampled for _, sampled, _ in played) / len(played),
        total_tokens_per_sample=sum(total for total, _, _ in played) / len(played),
    )


def make_engine(config: Config, url: str) -> Engine:
    """One engine with the run's settings, which serves the checkpoint's weights at once."""
    from slime_async.actors.embedded.engine import EmbeddedEngine
    from slime_async.actors.sglang.engine import SGLangEngine

    checkpoint, context = Path(config.model.path), config.sampling.max_context_tokens
    if url:
        return SGLangEngine(checkpoint, engine_id="saturated", url=url, max_context=context, weights=WeightId(0, 0))
    return EmbeddedEngine(
        checkpoint,
        slots=config.actor.max_running_requests,
        max_context=context,
        device=config.actor.device,
        threads=config.actor.threads,
        weights=WeightId(0, 0),
    )


class _Player:
    """Plays the tasks of a run in their order, any number at once."""

    def __init__(self, config: Config, rollout: Rollout) -> None:
        self._rollout = rollout
        self._group_size = config.batch.group_size
        [self._source] = list(config.task.train)[:1]
        self._sizes = rollout.source_sizes
        self._next = 0
        self._played: dict[int, list[tuple[int, int, float]]] = {}
        self.closing = False
        """Begin no more episodes"""

    async def play(self) -> None:
        while not self.closing:
            serial, sample = divmod(self._next, self._group_size)
            self._next += 1
            task = TaskRef(serial, self._source, serial % self._sizes[self._source])
            outcome = await self._rollout.run(Reservation(task, sample, 0))
            if not isinstance(outcome, Trajectory):
                raise RuntimeError(f"an episode failed: {outcome.reason}")
            episode = (len(outcome.token_ids), int(outcome.loss_mask.sum()), outcome.reward)
            self._played.setdefault(serial, []).append(episode)

    def complete_groups(self) -> list[list[tuple[int, int, float]]]:
        return [group for group in self._played.values() if len(group) == self._group_size]


async def _rate(player: _Player, engine: Engine, episodes: int, seconds: float, *, last: bool) -> EngineRate:
    """At a steady load: tokens per second, and how many requests ran.

    The last load's episodes are played to their end: those that are done first are the short ones.
    """
    async with asyncio.TaskGroup() as tasks:
        playing = [tasks.create_task(player.play()) for _ in range(episodes)]
        await asyncio.sleep(seconds * SETTLE_FRACTION)
        before, begun = (await engine.status()).generated_tokens, time.monotonic()
        running = []
        while time.monotonic() - begun < seconds:
            await asyncio.sleep(POLL_S)
            running.append((await engine.status()).running_requests)
        tokens, ended = (await engine.status()).generated_tokens - before, time.monotonic()
        player.closing = last
        for task in () if last else playing:
            task.cancel()
    return EngineRate(sum(running) / len(running), tokens / (ended - begun))


# ------------------------------------------------------------------------------------------------------------ learner


class MemoryFeed:
    """Batches of recorded shapes, until the time is up."""

    def __init__(self, config: Config, episodes: Sequence[Sequence[tuple[int, int, float]]], vocabulary: int) -> None:
        self._config = config
        self._episodes = episodes
        self._vocabulary = vocabulary
        self._began_s = 0.0

    def next_batch(self, train_version: int) -> Batch | None:
        if train_version == WARMUP_BATCHES:
            self._began_s = time.monotonic()
        if train_version > WARMUP_BATCHES + 1 and time.monotonic() - self._began_s > self._config.bench.saturated_s:
            return None
        groups = self._config.batch.groups
        chosen = [(train_version * groups + i) for i in range(groups)]
        return Batch(train_version, tuple(t for serial in chosen for t in self._group(serial, train_version)))

    def _group(self, serial: int, version: int) -> list[Trajectory]:
        return [
            self._trajectory(TaskRef(serial, "memory", 0), sample, version, episode)
            for sample, episode in enumerate(self._episodes[serial % len(self._episodes)])
        ]

    def _trajectory(self, task: TaskRef, sample: int, version: int, episode: tuple[int, int, float]) -> Trajectory:
        import numpy as np

        total, sampled, reward = episode
        rng = np.random.default_rng((task.serial, sample))
        mask = (np.arange(total) >= total - sampled).astype(np.uint8)
        return Trajectory(
            task=task,
            sample=sample,
            attempt=0,
            token_ids=rng.integers(0, self._vocabulary, total).astype(np.int32),
            loss_mask=mask,
            behavior_logprobs=(mask * -np.log(self._vocabulary)).astype(np.float32),
            spans=(VersionSpan(0, WeightId(1, version)),),
            reward=reward,
            finish_reason="length",
        )


def saturate_learner(config: Config, directory: Path) -> SaturatedLearner | None:
    """Seconds per batch of the learner's own loop; every rank takes part, the first one answers."""
    import torch
    import torch.distributed as dist

    from slime_async.learner.checkpoint.checkpointer import Checkpointer
    from slime_async.learner.checkpoint.directory import CheckpointDirectory
    from slime_async.learner.checkpoint.start import Start
    from slime_async.learner.loop import SilentOutlet, train
    from slime_async.learner.snapshots import Snapshots
    from slime_async.learner.trainer import Trainer
    from slime_async.telemetry.spans import SpanRecorder

    class Timed(SilentOutlet):
        """Keeps when each batch was done, and how large it was."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.tokens: list[float] = []
            self.snapshots: Snapshots | None = None

        def publish(self, trainer: Trainer, weights: WeightId) -> float:
            """The copy, without anybody to send it to."""
            if dist.get_rank() != 0:
                return super().publish(trainer, weights)
            self.snapshots = self.snapshots or Snapshots(trainer.manifest(), trainer.device)
            self.snapshots.fill(self.snapshots.begin(weights), trainer.export)
            return 0.0

        def log_step(self, step: int, metrics: dict[str, float]) -> None:
            self.ends.append(time.monotonic())
            self.tokens.append(metrics["batch_tokens"])

    torch.set_num_threads(config.learner.threads)
    checkpoints, start, outlet = CheckpointDirectory(directory / "checkpoints"), Start(1), Timed()
    trainer = Trainer.build(config, Path(config.model.path))
    vocabulary = int(json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"])
    feed = MemoryFeed(config, json.loads((directory / EPISODES).read_text()), vocabulary)  # the same on every rank
    checkpointer = Checkpointer(config, trainer, checkpoints, start.incarnation, None, outlet.durable)
    with closing(SpanRecorder(None, "learner")) as recorder:
        train(config, trainer, feed, outlet, recorder, checkpointer, start)
    if dist.get_rank() != 0:
        return None
    batches = len(outlet.ends) - WARMUP_BATCHES
    seconds = outlet.ends[-1] - outlet.ends[WARMUP_BATCHES - 1]
    return SaturatedLearner(
        devices=dist.get_world_size(),
        batch_s=seconds / batches,
        batch_tokens=sum(outlet.tokens[WARMUP_BATCHES:]) / batches,
    )


if __name__ == "__main__":
    from slime_async.cli.common import leave_at_once

    code = main(sys.argv[1:])
    if code == 0:
        leave_at_once()
    sys.exit(code)
