"""``python -m slime_async.cli.saturate SIDE CONFIG DIRECTORY``: one side of a run alone, for the benchmark.

===========  ========================================================  ===============================================
SIDE         does                                                      writes into DIRECTORY
===========  ========================================================  ===============================================
warm-start   the supervised phase, once for all modes                  a checkpoint, ``start``
engine       plays the run's own episodes, as many at once as it can,  ``saturated-engine.json``, ``episodes.json``
             and bursts of equal requests
full-engine  an actor of ``--hub``, which always grants; others may    the first file of ``--together``, as JSON
             be full at the same time: the files of ``--together``
nobody       a learner of ``--hub`` that publishes, and never          ``published``
             leases; it stays until it is killed
learner      the training loop on batches like ``episodes.json``,      ``saturated-learner.json``; ``learner.ready``
             from memory; with ``--beside`` it goes on until the file  once that is measured, ``learner-batches.json``
             ``learner.stop`` is there
===========  ========================================================  ===============================================
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slime_async.bench.saturated import SaturatedLearner
from slime_async.bench.speed import CoreSpeeds
from slime_async.cli.saturate_engine import Episode, keep_full, saturate
from slime_async.config import Config, load_config
from slime_async.protocol import Batch, Hello, Message, Published
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId

if TYPE_CHECKING:
    import torch

    from slime_async.learner.trainer import Trainer

EPISODES = "episodes.json"
START = "start"
LEARNER_READY = "learner.ready"
LEARNER_STOP = "learner.stop"
LEARNER_BATCHES = "learner-batches.json"
WARMUP_BATCHES = 1
CALL_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 0.0
"""Nothing is sent"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m slime_async.cli.saturate", description=__doc__)
    parser.add_argument("side", choices=("warm-start", "engine", "full-engine", "nobody", "learner"))
    parser.add_argument("config", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--url", default="", help="of an SGLang server that runs")
    parser.add_argument("--hub", default="", help="address of a hub that always grants")
    parser.add_argument("--together", nargs="+", type=Path, help="this engine's file, and those of the others")
    parser.add_argument("--beside", action="store_true", help="go on training while an engine is measured")
    parsed = parser.parse_args(arguments)
    config, directory = load_config(parsed.config), parsed.directory
    match parsed.side:
        case "warm-start":
            supervise(config, directory)
        case "engine":
            engine, groups = asyncio.run(saturate(config, parsed.url))
            (directory / EPISODES).write_text(json.dumps(groups))
            (directory / "saturated-engine.json").write_text(json.dumps(engine.to_plain()))
        case "full-engine":
            import uvloop  # as a run's actor

            full = uvloop.run(keep_full(config, parsed.url, parsed.hub, parsed.together))
            parsed.together[0].write_text(json.dumps(asdict(full)))
        case "nobody":
            asyncio.run(open_admission(parsed.hub, directory))
        case "learner":
            learner = saturate_learner(config, directory, parsed.beside)
            if learner is not None:
                (directory / "saturated-learner.json").write_text(json.dumps(learner.to_plain()))
    return 0


async def open_admission(hub: str, directory: Path) -> None:
    """A hub grants nothing before the first publication."""
    from slime_async.transport.client import HubClient

    async def ignore(message: Message) -> None:
        """Whatever the hub tells its learner."""

    client = await HubClient.connect(hub, Hello("learner", "nobody", incarnation=1), handler=ignore)
    await client.call(Published(WeightId(1, 0)), CALL_TIMEOUT_S)
    (directory / "published").touch()
    await client.wait_closed()


def supervise(config: Config, directory: Path) -> None:
    """Every mode begins from these weights."""
    import torch

    from slime_async.learner.trainer import Trainer
    from slime_async.learner.warm_start import warm_start

    torch.set_num_threads(config.learner.threads)
    trainer = Trainer.build(config, Path(config.model.path))
    warm_start(config, trainer, directory, lambda *_: None)
    trainer.save_hf(directory / START)


class MemoryFeed:
    """Batches of recorded shapes, until the time is up; with ``beside``, on until somebody says so."""

    def __init__(
        self, config: Config, episodes: Sequence[Sequence[Episode]], vocabulary: int, directory: Path, beside: bool
    ) -> None:
        self._config = config
        self._episodes = episodes
        self._vocabulary = vocabulary
        self._directory = directory
        self._beside = beside
        self._began_s = 0.0
        self.alone = 0
        """Batches until the time was up"""

    def next_batch(self, train_version: int) -> Batch | None:
        if train_version == WARMUP_BATCHES:
            self._began_s = time.monotonic()
        measured = (
            train_version > WARMUP_BATCHES + 1 and time.monotonic() - self._began_s > self._config.bench.saturated_s
        )
        if measured and not self.alone:
            self.alone = train_version
            (self._directory / LEARNER_READY).touch()
        if measured and not (self._beside and not (self._directory / LEARNER_STOP).exists()):
            return None
        groups = self._config.batch.groups
        chosen = [(train_version * groups + i) for i in range(groups)]
        return Batch(train_version, tuple(t for serial in chosen for t in self._group(serial, train_version)))

    def _group(self, serial: int, version: int) -> list[Trajectory]:
        return [
            self._trajectory(TaskRef(serial, "memory", 0), sample, version, episode)
            for sample, episode in enumerate(self._episodes[serial % len(self._episodes)])
        ]

    def _trajectory(self, task: TaskRef, sample: int, version: int, episode: Episode) -> Trajectory:
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


class FromFirstRank:
    """The same batches on every rank, the end included: the clock of the first rank decides."""

    def __init__(self, feed: MemoryFeed, device: torch.device) -> None:
        self._feed = feed
        self._device = device

    def next_batch(self, train_version: int) -> Batch | None:
        import torch.distributed as dist

        from slime_async.learner.fetch import broadcast

        return broadcast(self._feed.next_batch(train_version) if dist.get_rank() == 0 else None, 0, self._device)


def saturate_learner(config: Config, directory: Path, beside: bool) -> SaturatedLearner | None:
    """Seconds per batch of the learner's own loop; every rank takes part, the first one answers. With ``beside``, also
    when each batch ended, those after the measurement included, to ``LEARNER_BATCHES``."""
    import torch
    import torch.distributed as dist

    from slime_async.learner.checkpoint.checkpointer import Checkpointer
    from slime_async.learner.checkpoint.directory import CheckpointDirectory
    from slime_async.learner.checkpoint.start import Start
    from slime_async.learner.loop import SilentOutlet, train
    from slime_async.learner.snapshots import Snapshots
    from slime_async.learner.trainer import Trainer
    from slime_async.learner.weights_outlet import FollowingOutlet, WeightShare
    from slime_async.telemetry.spans import SpanRecorder

    class Timed(SilentOutlet):
        """Keeps when each batch was done, and how large it was."""

        def __init__(self) -> None:
            super().__init__(FollowingOutlet(WeightShare(), SEND_TIMEOUT_S))
            self.ends: list[float] = []
            self.tokens: list[float] = []
            self.snapshots: Snapshots | None = None

        def publish(self, trainer: Trainer, weights: WeightId) -> float:
            """The copy, without anybody to send it to."""
            if dist.get_rank() != 0:
                return super().publish(trainer, weights)
            self.snapshots = self.snapshots or Snapshots(
                trainer.manifest(), trainer.device, config.weights.buffer_bytes
            )
            self.snapshots.fill(self.snapshots.begin(weights), trainer.export)
            return 0.0

        def log_step(self, step: int, metrics: dict[str, float]) -> None:
            self.ends.append(time.time())
            self.tokens.append(metrics["batch_tokens"])

    torch.set_num_threads(config.learner.threads)
    checkpoints, start, outlet = CheckpointDirectory(directory / "checkpoints"), Start(1), Timed()
    trainer = Trainer.build(config, Path(config.model.path))
    vocabulary = int(json.loads((Path(config.model.path) / "config.json").read_text())["vocab_size"])
    episodes = [[Episode(*one) for one in group] for group in json.loads((directory / EPISODES).read_text())]
    memory = MemoryFeed(config, episodes, vocabulary, directory, beside)
    feed = FromFirstRank(memory, trainer.device)
    checkpointer = Checkpointer(config, trainer, checkpoints, start.incarnation, None, outlet.durable)
    watched = os.sched_getaffinity(0) if trainer.device.type == "cpu" and dist.get_rank() == 0 else ()
    with closing(SpanRecorder(None, "learner")) as recorder, CoreSpeeds(watched) as speeds:
        train(config, trainer, feed, outlet, recorder, checkpointer, start)
    if dist.get_rank() != 0:
        return None
    if beside:
        (directory / LEARNER_BATCHES).write_text(json.dumps(list(zip(outlet.ends, outlet.tokens, strict=True))))
    batches = memory.alone - WARMUP_BATCHES
    began_s, ended_s = outlet.ends[WARMUP_BATCHES - 1], outlet.ends[memory.alone - 1]
    return SaturatedLearner(
        devices=dist.get_world_size(),
        batch_s=(ended_s - began_s) / batches,
        batch_tokens=sum(outlet.tokens[WARMUP_BATCHES : memory.alone]) / batches,
        speed=speeds.between(began_s, ended_s),
    )


if __name__ == "__main__":
    from slime_async.cli.common import leave_at_once

    code = main(sys.argv[1:])
    if code == 0:
        leave_at_once()
    sys.exit(code)
