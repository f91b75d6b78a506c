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
from slime_async.learner.loop import SilentOutlet, train
from slime_async.learner.trainer import Trainer
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


class RecordedFeed:
    """The same batches in every life: a function of their version."""

    def next_batch(self, train_version: int) -> Batch:
        rng = np.random.default_rng(train_version)
        trajectories = []
        for i in range(6):
            n = int(rng.integers(3, 18))
            trajectory = Trajectory(
                task=TaskRef(3 * train_version + i // 2, "recorded", 0),
                sample=i % 2,
                attempt=0,
                token_ids=rng.integers(0, 33, n).astype(np.int32),
                loss_mask=(np.arange(n) > 1).astype(np.uint8),
                behavior_logprobs=rng.normal(-3.5, 0.5, n).astype(np.float32),
                spans=(VersionSpan(0, WeightId(1, train_version)),),
                reward=float(rng.normal()),
                finish_reason="stop",
            )
            trajectories.append(trajectory)
        return Batch(train_version, tuple(trajectories))


class FileOutlet(SilentOutlet):
    """Metrics to the run's file; ``committed`` is called after each batch."""

    def __init__(self, run: Path, incarnation: int, committed: Callable[[int], None]) -> None:
        self.metrics = MetricsWriter(run / "metrics.jsonl", incarnation)
        self.durable_versions: list[int] = []
        self._committed = committed

    def commit(self, train_version: int) -> None:
        self._committed(train_version)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.write(step, metrics)

    def durable(self, version: int, seconds: float) -> None:
        self.durable_versions.append(version)


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
    config: Config, model: Path, run: Path, committed: Callable[[int], None] = lambda _version: None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Train to ``run.steps``, from wherever the run is: the weights, and the versions that became durable."""
    with life(config, model, run) as (trainer, start, directory):
        outlet = FileOutlet(run, start.incarnation, committed)
        checkpointer = Checkpointer(config, trainer, directory, start.incarnation, start.state, outlet.durable)
        with closing(SpanRecorder(run / "spans.jsonl", "learner")) as recorder, closing(outlet.metrics):
            train(config, trainer, RecordedFeed(), outlet, recorder, checkpointer, start)
        return {name: tensor.detach().clone() for name, tensor in trainer.export()}, outlet.durable_versions


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
