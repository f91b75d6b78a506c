"""The training loop: the only finite loop of a run.

::

    for version in 0 … steps − 1:                                  waits for
        batch    = feed.next_batch(version)                        the hub (a complete, leased batch)
        result   = trainer.train_policy(batch)                     the device
        commit(version)                                            the hub's acknowledgement
        publisher.publish(snapshot, version + 1)                   only if the publication before has not begun
        fill(snapshot)                                             the conversion out of the model

The same loop runs on every rank; rank 0's ``Reporting`` talks to hub, publisher and files, the others' does nothing.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from slime_async.config import Config
from slime_async.learner.batch import prepare_batch
from slime_async.learner.feed import Feed
from slime_async.learner.trainer import Trainer
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId

log = logging.getLogger(__name__)


class Outlet(Protocol):
    """What leaves the training loop."""

    def commit(self, train_version: int) -> None: ...

    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        """Hand out the trainer's weights as they are now; returns the seconds that the loop had to wait before.

        A collective: every rank calls it.
        """

    def log_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def begin(self, activity: str, step: int) -> None:
        """For the live view: what the loop does from now on."""


class SilentOutlet:
    """For every rank but the first: others speak for it."""

    def commit(self, train_version: int) -> None:
        """Rank 0 commits."""

    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        trainer.take_part_in_export()
        return 0.0

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0 logs."""

    def begin(self, activity: str, step: int) -> None:
        """Rank 0 reports."""


def train(
    config: Config, trainer: Trainer, feed: Feed, outlet: Outlet, recorder: SpanRecorder, incarnation: int
) -> None:
    """Train ``run.steps`` batches. Every wait inside has a deadline and names what it waited for."""
    for version in range(config.run.steps):
        asked = time.monotonic()
        with recorder.span("lease", step=version):
            batch = feed.next_batch(version)
        leased = time.monotonic()
        outlet.begin("train", version)
        with recorder.span("train", step=version):
            prepared = prepare_batch(batch.trajectories, version, config)
            prepared.metrics["tokens_masked_as_stale"] += batch.stale_tokens_dropped
            result = trainer.train_policy(prepared.sequences, version)
        trained = time.monotonic()
        with recorder.span("commit", step=version):
            outlet.commit(version)
        with recorder.span("snapshot", step=version):
            publish_wait_s = outlet.publish(trainer, WeightId(incarnation, version + 1))
        snapshotted = time.monotonic()
        seconds = {
            "lease_wait_s": leased - asked,
            "train_s": trained - leased,
            "snapshot_s": snapshotted - trained - publish_wait_s,
            "publish_stall_s": publish_wait_s,
            "step_s": time.monotonic() - asked,
            "learner_tokens_per_s": prepared.metrics["batch_tokens"] / (trained - leased),
        }
        step = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_computed": float(result.tokens_computed),
            "tokens_counted": float(result.tokens_counted),
        }
        outlet.log_step(version, {**prepared.metrics, **step, **result.metrics, **seconds})
