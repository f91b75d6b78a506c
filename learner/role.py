"""The learner's process: warm start, publication of version 0, evaluation, the training loop, evaluation, export.

Rank 0 holds the connection to the hub and the publisher; all ranks run the same phases in the same order.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from slime_async.config import Config
from slime_async.learner.carriers import Backend
from slime_async.learner.feed import Feed, FollowingFeed, HubFeed, SharingFeed
from slime_async.learner.loop import SilentOutlet, train
from slime_async.learner.publisher import Publisher
from slime_async.learner.snapshots import Snapshots
from slime_async.learner.trainer import Trainer
from slime_async.learner.warm_start import warm_start
from slime_async.protocol import (
    Commit,
    EngineInfo,
    Evaluate,
    EvaluationResult,
    Finish,
    Hello,
    Membership,
    Message,
    Report,
    Shutdown,
)
from slime_async.telemetry.events import EventLog
from slime_async.telemetry.metrics import MetricsWriter
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.codec import DEFAULT_LIMITS

log = logging.getLogger(__name__)

INCARNATION = 1
"""Until learners restart from checkpoints, a run has one."""
CLOSE_TIMEOUT_S = 1.0
"""For the publisher to stop; after a finished run it has nothing left to send."""
CALL_TIMEOUT_S = 60.0
"""For calls that the hub answers at once."""


class HubOutlet:
    """Rank 0's way out: commits and metrics to hub and files, weights to the publisher."""

    def __init__(self, config: Config, client: BlockingClient, publisher: Publisher, run_directory: Path) -> None:
        self._config = config
        self._client = client
        self._publisher = publisher
        self._metrics = MetricsWriter(run_directory / "metrics.jsonl")
        self._snapshots: Snapshots | None = None
        self._report: Report = {}

    def commit(self, train_version: int) -> None:
        self._client.call(Commit(INCARNATION, train_version), CALL_TIMEOUT_S)

    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        if self._snapshots is None:
            self._snapshots = Snapshots(trainer.manifest(), trainer.device)
        snapshot = self._snapshots.begin(weights)
        waited_s = self._publisher.publish(snapshot, self._config.weights.timeout_s * 4)
        self._snapshots.fill(snapshot, trainer.export)  # the buffers are free from here on
        return waited_s

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        for times in self._publisher.take_times():
            metrics |= {
                "publish_s": times.total_s,
                "pause_to_resume_s": times.pause_to_resume_s,
                "broadcast_s": times.broadcast_s,
                "engines": times.engines,
                "requests_in_flight_at_update": times.requests_in_flight,
            }
        self._metrics.write(step, metrics)
        shown = ("reward_mean", "loss", "staleness_mean", "staleness_max", "learner_tokens_per_s")
        self._report = {name: metrics[name] for name in shown}
        self.begin("lease", step + 1)

    def begin(self, activity: str, step: int) -> None:
        """For the live view: what the learner does now."""
        steps = self._config.run.steps
        self._client.set_report({"phase": "rl", "step": step, "steps": steps, "activity": activity, **self._report})

    def close(self) -> None:
        self._metrics.close()


class _Mail:
    """What the hub sends on its own: members for the publisher, and the word to leave."""

    def __init__(self) -> None:
        self.publisher: Publisher | None = None
        self.engines: tuple[EngineInfo, ...] = ()
        self.shutdown: Shutdown | None = None

    async def handle(self, message: Message) -> Message | None:
        match message:
            case Membership():
                self.engines = message.engines
                if self.publisher is not None:
                    self.publisher.set_engines(message.engines)
            case Shutdown():
                self.shutdown = message
            case _:
                raise ValueError(f"{type(message).__name__} is nothing that a learner does")
        return None

    def check(self) -> None:
        """Raises when the hub ended the run."""
        if self.shutdown is not None:
            raise RuntimeError(f"the hub ended the run: {self.shutdown.reason}")


class Learner:
    """Rank 0 and its phases; the other ranks run ``follow``."""

    def __init__(self, config: Config, hub_address: str, run_directory: Path) -> None:
        self._config = config
        self._hub_address = hub_address
        self._run_directory = run_directory
        self._recorder = SpanRecorder(run_directory / "spans" / "learner.jsonl", "learner")
        self._events = EventLog(run_directory / "events.jsonl")
        self._mail = _Mail()
        hello = Hello(role="learner", name=f"learner-{os.getpid()}", incarnation=INCARNATION, version=0)
        self._client = BlockingClient.connect(hub_address, hello, handler=self._mail.handle)
        self._mail.engines = self._mail.engines or self._client.welcome.engines  # a later word wins

    def run(self) -> None:
        try:
            self._client.set_report({"phase": "starting"})
            trainer = Trainer.build(self._config, Path(self._config.model.path))
            self._publisher = Publisher(
                self._client,
                self._config.weights,
                weight_backend(self._config, trainer),
                self._recorder,
                own_address(self._hub_address),
            )
            self._mail.publisher = self._publisher
            self._publisher.set_engines(self._mail.engines)
            self._outlet = HubOutlet(self._config, self._client, self._publisher, self._run_directory)
            self._phases(trainer)
            self._client.call(Finish("the run is complete"), CALL_TIMEOUT_S)
        finally:
            self._recorder.close()
            self._events.close()
            if self._mail.publisher is not None:
                self._publisher.close(CLOSE_TIMEOUT_S)
                self._outlet.close()
            self._client.close()

    def _phases(self, trainer: Trainer) -> None:
        config = self._config
        warm_start(config, trainer, self._run_directory / "checkpoints", self._warm_start_progress)
        self._outlet.publish(trainer, WeightId(INCARNATION, 0))
        self._client.set_report({"phase": "waiting for actors"})
        self._publisher.wait_published(0, config.actor.startup_timeout_s)
        if config.evaluation.before:
            self._evaluate("before")
        self._events.write("phase", name="rl", done=False)
        train(config, trainer, self._feed(trainer), self._outlet, self._recorder, incarnation=INCARNATION)
        self._events.write("phase", name="rl", done=True)
        self._publisher.wait_published(config.run.steps, config.weights.timeout_s * 4)
        if config.evaluation.after:
            self._evaluate("after")
        self._client.set_report({"phase": "saving"})
        trainer.save_hf(self._run_directory / "checkpoints" / "final")

    def _feed(self, trainer: Trainer) -> Feed:
        def check() -> None:
            self._mail.check()
            self._client.check()
            self._publisher.check()

        feed: Feed = HubFeed(
            self._client, INCARNATION, self._config.run.steps, self._config.learner.lease_timeout_s, check
        )
        return feed if dist.get_world_size() == 1 else SharingFeed(feed, trainer.device)

    def _warm_start_progress(self, phase: str, step: int, steps: int, loss: float) -> None:
        self._mail.check()
        self._client.set_report({"phase": phase, "step": step, "steps": steps, "loss": loss})

    def _evaluate(self, name: str) -> None:
        """Every evaluation source, by the actors; the result goes to the event log under its name."""
        wait_s = self._config.evaluation.timeout_s
        for source in self._config.task.evaluation:
            self._client.set_report({"phase": f"evaluation_{name}"})
            message = Evaluate(f"{name}/{source}", source, self._config.evaluation.tasks, wait_s)
            begun = time.monotonic()
            result = self._client.call(message, wait_s + CALL_TIMEOUT_S)
            assert isinstance(result, EvaluationResult)
            self._events.write(
                "evaluation",
                name=name,
                source=source,
                accuracy=result.accuracy,
                tasks=result.tasks,
                failed=result.failed,
                version=result.versions[-1] if result.versions else -1,
                seconds=time.monotonic() - begun,
            )
            log.info("evaluation %s on %s: %.3f over %d tasks", name, source, result.accuracy, result.tasks)


def weight_backend(config: Config, trainer: Trainer) -> Backend:
    """As configured; ``auto`` follows the device of the learner's weights."""
    if config.weights.backend != "auto":
        return config.weights.backend
    return "nccl" if trainer.device.type == "cuda" else "gloo"


def own_address(hub_address: str) -> str:
    """The address of this machine on the way to the hub, where engines beside the hub can reach it as well."""
    host, _, port = hub_address.removeprefix("tcp://").rpartition(":")
    family, kind, *_, peer = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(peer)  # sends nothing: the kernel chooses a route
        address: str = probe.getsockname()[0]
    return address


def follow(config: Config, run_directory: Path) -> None:
    """Every rank but the first: the same phases, with batches from rank 0 and nothing to say."""
    with closing(SpanRecorder(run_directory / "spans" / f"learner-{os.environ['RANK']}.jsonl", "learner")) as recorder:
        trainer = Trainer.build(config, Path(config.model.path))
        warm_start(config, trainer, run_directory / "checkpoints", lambda *_: None)
        trainer.take_part_in_export()  # of version 0
        feed = FollowingFeed(trainer.device, DEFAULT_LIMITS)
        train(config, trainer, feed, SilentOutlet(), recorder, incarnation=INCARNATION)
        trainer.save_hf(run_directory / "checkpoints" / "final")


def run_learner(config: Config, hub_address: str, run_directory: Path) -> None:
    """One rank of the learner; which one, torchrun's environment says (a lone process needs none)."""
    torch.set_num_threads(config.learner.threads)
    if int(os.environ.get("RANK", "0")) == 0:
        Learner(config, hub_address, run_directory).run()
    else:
        follow(config, run_directory)
