"""The training loop: the only finite loop of a run.

::

    for version in first … steps − 1:                              waits for
        batch    = feed.next_batch(version)                        the hub (a complete, leased batch)
        result   = trainer.train_policy(batch)                     the device
        commit(version)                                            the hub's acknowledgement
        publisher.publish(snapshot, version + 1)                   only if the publication before has not begun
        fill(snapshot)                                             the conversion out of the model
        checkpointer.after_batch(version + 1)                      only if one is due and the one before not written

The same loop runs on every rank; rank 0's ``Outlet`` talks to hub, publisher and files, the others' hand out their part
of the weights where several ranks are sources, and do nothing else.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from slime_async.config import Config
from slime_async.learner.batch import filtered, judged, prepare_batch
from slime_async.learner.checkpoint.checkpointer import Checkpointer
from slime_async.learner.checkpoint.start import Start
from slime_async.learner.feed import Feed
from slime_async.learner.trainer import Trainer
from slime_async.learner.weights_outlet import WeightsOutlet
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

    def durable(self, version: int, seconds: float) -> None:
        """A checkpoint of ``version`` is complete; writing it took ``seconds``."""


class SilentOutlet:
    """For every rank but the first: others speak for it."""

    def __init__(self, weights: WeightsOutlet) -> None:
        self._weights = weights

    def commit(self, train_version: int) -> None:
        """Rank 0 commits."""

    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        return self._weights.publish(trainer, weights)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0 logs."""

    def begin(self, activity: str, step: int) -> None:
        """Rank 0 reports."""

    def durable(self, version: int, seconds: float) -> None:
        """Rank 0 tells."""


def train(
    config: Config,
    trainer: Trainer,
    feed: Feed,
    outlet: Outlet,
    recorder: SpanRecorder,
    checkpointer: Checkpointer,
    start: Start,
) -> int:
    """Train until ``run.steps`` batches are, or the time is up; returns the version reached.

    Every wait inside has a deadline and names what it waited for.
    """
    checkpoint_stall_s, reached = 0.0, start.version
    for version in range(start.version, config.run.steps):
        asked = time.monotonic()
        with recorder.span("lease", step=version):
            batch = feed.next_batch(version)
        if batch is None:
            break
        leased = time.monotonic()
        outlet.begin("train", version)
        with recorder.span("train", step=version):
            with recorder.span("prepare", step=version):
                prepared = prepare_batch(judged(batch), version, config)
                prepared.metrics["tokens_masked_as_stale"] += batch.stale_tokens_dropped
                prepared.metrics.update(filtered(batch, config.batch.groups))
            result = trainer.train_policy(prepared.sequences, version)
        trained = time.monotonic()
        with recorder.span("commit", step=version):
            outlet.commit(version)
        committed = time.monotonic()
        publish_wait_s = _publish(outlet, trainer, WeightId(start.incarnation, version + 1), recorder)
        snapshotted = time.monotonic()
        seconds = {
            "lease_wait_s": leased - asked,
            "train_s": trained - leased,
            "commit_s": committed - trained,
            "snapshot_s": snapshotted - committed - publish_wait_s,
            "publish_stall_s": publish_wait_s,
            "checkpoint_stall_s": checkpoint_stall_s,
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
        with recorder.span("log", step=version):
            outlet.log_step(version, {**prepared.metrics, **step, **result.metrics, **seconds})
        with recorder.span("checkpoint", step=version):
            checkpoint_stall_s = checkpointer.after_batch(version + 1, batch)  # after the line that it makes final
        reached = version + 1
    with recorder.span("checkpoint", step=reached):
        checkpointer.finish(reached)
    return reached


def _publish(outlet: Outlet, trainer: Trainer, weights: WeightId, recorder: SpanRecorder) -> float:
    """First the wait for the publication before, whose seconds this returns; then the snapshot."""
    begun_ns = time.monotonic_ns()
    waited_s = outlet.publish(trainer, weights)
    waited_ns = begun_ns + int(waited_s * 1e9)
    recorder.add("publish_stall", begun_ns, waited_ns, step=weights.version - 1)
    recorder.add("snapshot", waited_ns, max(waited_ns, time.monotonic_ns()), step=weights.version - 1)
    return waited_s
