"""Training on recorded batches, with checkpoints: what the resume tests run, in their own process or in one they kill.

``recorded.py RUN MODEL CONFIG STOP`` trains in RUN, says ``trained V`` after each batch, and after STOP waits to be
killed.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slime_async.config import Config
from slime_async.learner.checkpoint.checkpointer import Checkpointer
from slime_async.learner.checkpoint.directory import CheckpointDirectory
from slime_async.learner.checkpoint.start import Start
from slime_async.learner.feed import Feed
from slime_async.learner.loop import SilentOutlet, train
from slime_async.learner.trainer import Trainer
from slime_async.learner.weights_outlet import FollowingOutlet, WeightShare
from slime_async.protocol import Batch
from slime_async.telemetry.metrics import MetricsWriter
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"steps": 6, "deterministic": True},
    "staleness": {"max_staleness": 0},
    "batch": {"groups": 3, "group_size": 2},
    "learner": {"learning_rate": 1e-3, "warmup_steps": 8, "weight_decay": 0.1},
    "algorithm": {"kl_coef": 0.1, "entropy_coef": 0.01},
    "checkpoint": {"interval_steps": 3},
}
"""Everything that has a state: moments, warm-up, reference weights"""


def recorded(task: TaskRef, sample: int, version: int) -> Trajectory:
    """The same in every life."""
    rng = np.random.default_rng((task.serial, sample))
    n = int(rng.integers(3, 18))
    return Trajectory(
        task=task,
        sample=sample,
        attempt=0,
        token_ids=rng.integers(0, 33, n).astype(np.int32),
        loss_mask=(np.arange(n) > 1).astype(np.uint8),
        behavior_logprobs=rng.normal(-3.5, 0.5, n).astype(np.float32),
        spans=(VersionSpan(0, WeightId(1, version)),),
        reward=float(rng.normal()),
        finish_reason="stop",
    )


class RecordedFeed:
    """Batches as ``SECTIONS`` shapes them."""

    def next_batch(self, train_version: int) -> Batch:
        tasks = [TaskRef(3 * train_version + i, "recorded", 0) for i in range(3)]
        return Batch(train_version, tuple(recorded(task, i, train_version) for task in tasks for i in range(2)))


def no_one(_version: int) -> None:
    """Nobody wants to know."""


class FileOutlet(SilentOutlet):
    """Metrics to the run's file; ``committed`` is called after each batch."""

    def __init__(self, run: Path, incarnation: int, committed: Callable[[int], None]) -> None:
        super().__init__(FollowingOutlet(WeightShare(), 0.0))
        self.metrics = MetricsWriter(run / "metrics.jsonl", incarnation)
        self.durable_versions: list[int] = []
        self.on_durable = no_one
        self._committed = committed

    def commit(self, train_version: int) -> None:
        self._committed(train_version)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.write(step, metrics)

    def durable(self, version: int, seconds: float) -> None:
        self.durable_versions.append(version)
        self.on_durable(version)


@contextmanager
def life(config: Config, model: Path, run: Path) -> Iterator[tuple[Trainer, Start, CheckpointDirectory]]:
    """A learner of one rank, brought to the run's latest checkpoint."""
    directory = CheckpointDirectory(run / "checkpoints")
    start = Start.take(run, directory)
    trainer = Trainer.build(config, model)
    try:
        start.load(config, trainer, directory)
        yield trainer, start, directory
    finally:
        trainer.close()


def train_run(
    config: Config, model: Path, run: Path, committed: Callable[[int], None] = no_one
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train to ``run.steps``, from wherever the run is: the weights, and the versions that became durable."""
    with life(config, model, run) as (trainer, start, directory):
        outlet = FileOutlet(run, start.incarnation, committed)
        return train_life(config, trainer, start, directory, RecordedFeed(), outlet), outlet.durable_versions


def train_life(
    config: Config, trainer: Trainer, start: Start, directory: CheckpointDirectory, feed: Feed, outlet: FileOutlet
) -> dict[str, torch.Tensor]:
    """One learner's life, from ``start`` to ``run.steps``; the weights at its end."""
    checkpointer = Checkpointer(config, trainer, directory, start.incarnation, start.state, outlet.durable)
    with closing(SpanRecorder(directory.path.parent / "spans.jsonl", "learner")) as recorder, closing(outlet.metrics):
        train(config, trainer, feed, outlet, recorder, checkpointer, start)
    return {name: tensor.detach().clone() for name, tensor in trainer.export()}


def main() -> None:
    run, model, text, stop = sys.argv[1:]
    torch.set_num_threads(1)

    def committed(version: int) -> None:
        sys.stdout.write(f"trained {version}\n")
        sys.stdout.flush()
        if version == int(stop):
            signal.pause()

    train_run(Config.model_validate(json.loads(text)), Path(model), Path(run), committed)


if __name__ == "__main__":
    main()
