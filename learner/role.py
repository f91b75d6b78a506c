"""The learner's process: warm start, publication of version 0, evaluation, the training loop, evaluation, export.

Where the run has a checkpoint, a learner goes on from the latest instead: it publishes those weights and trains.
Rank 0 holds the connection to the hub and the publisher; all ranks run the same phases in the same order.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from slime_async.addresses import own_address
from slime_async.config import Config
from slime_async.correction.floor import MismatchFloor
from slime_async.correction.warnings import WarningLog
from slime_async.learner.carriers import weight_backend
from slime_async.learner.checkpoint.checkpointer import Checkpointer, OnDurable
from slime_async.learner.checkpoint.directory import CheckpointDirectory
from slime_async.learner.checkpoint.start import Start
from slime_async.learner.evaluations import ScheduledEvaluations, write_result
from slime_async.learner.feed import Feed, HubFeed
from slime_async.learner.fetch import fetching_feed
from slime_async.learner.loop import SilentOutlet, train
from slime_async.learner.megatron.parallel import data_parallel_leaders
from slime_async.learner.publisher import Publisher
from slime_async.learner.trainer import Trainer
from slime_async.learner.warm_start import Progress, warm_start
from slime_async.learner.weights_outlet import FollowingOutlet, PublishingOutlet, WeightShare, WeightsOutlet
from slime_async.protocol import (
    Commit,
    Durable,
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
from slime_async.telemetry.loggers import make_loggers
from slime_async.telemetry.metrics import MetricsWriter
from slime_async.telemetry.occupancy import Occupancy
from slime_async.telemetry.process import PROCESS
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.clock import ClockKeeper
from slime_async.transport.security import client_security

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 1.0
"""For the publisher to stop; after a finished run it has nothing left to send."""
CALL_TIMEOUT_S = 60.0
"""For calls that the hub answers at once, where it is there."""
KEPT = ("publish_s", "pause_to_resume_s")
"""What not every step has anew"""
SHOWN = (
    "reward_mean",
    "loss",
    "staleness_mean",
    "staleness_max",
    "learner_tokens_per_s",
    "mismatch/ess",
    "mismatch/ratio_max",
    *KEPT,
)
"""Of a step's metrics, what goes to the live view; the histogram of staleness, too"""


class HubOutlet:
    """Rank 0's way out: commits and metrics to hub and files, weights to the publisher."""

    def __init__(
        self,
        config: Config,
        client: BlockingClient,
        publisher: Publisher,
        events: EventLog,
        evaluations: ScheduledEvaluations,
        run_directory: Path,
        clock: ClockKeeper,
        incarnation: int,
        weights: WeightsOutlet,
    ) -> None:
        self._config = config
        self._weights = weights
        self._evaluations = evaluations
        self._client = client
        self._clock = clock
        clock.keep()
        self._publisher = publisher
        self._events = events
        self._incarnation = incarnation
        self._floor = MismatchFloor()
        self._warnings = WarningLog(config.algorithm)
        self._metrics = MetricsWriter(run_directory / "metrics.jsonl", incarnation)
        self._loggers = make_loggers(config, run_directory)
        self._report: Report = {}

    def commit(self, train_version: int) -> None:
        self._client.call(Commit(self._incarnation, train_version), call_timeout_s(self._config), retry=True)

    def durable(self, version: int, seconds: float) -> None:
        self._client.call(Durable(self._incarnation, version), call_timeout_s(self._config), retry=True)
        self._events.write("checkpoint", version=version, seconds=seconds)

    def publish(self, trainer: Trainer, weights: WeightId) -> float:
        return self._weights.publish(trainer, weights)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self._evaluations.published(self._publisher.published)
        metrics |= self._evaluations.collect()
        for times in self._publisher.take_times():
            metrics |= {
                "publish_s": times.total_s,
                "pause_to_resume_s": times.pause_to_resume_s,
                "broadcast_s": times.broadcast_s,
                "engines": times.engines,
                "requests_in_flight_at_update": times.requests_in_flight,
            }
        metrics |= self._floor.beside(metrics)
        self._metrics.write(step, metrics)
        for finding in self._warnings.check(step, metrics):
            log.warning("step %d: %s", step, finding.message)
            self._events.write("step_warning", step=step, **finding.fields())
        self._to_loggers(step, metrics)
        PROCESS.tell("step", metrics)
        shown = {name: value for name, value in metrics.items() if name in SHOWN or name.startswith("staleness/")}
        self._report = {**{name: self._report[name] for name in KEPT if name in self._report}, **shown}
        self.begin("lease", step + 1)
        self._clock.keep()

    def begin(self, activity: str, step: int) -> None:
        """For the live view: what the learner does now."""
        steps = self._config.run.steps
        self._client.set_report({"phase": "rl", "step": step, "steps": steps, "activity": activity, **self._report})

    def log_accuracy(self, version: int, name: str, accuracy: float) -> None:
        """Of one evaluation, to the loggers; the event log has it anyway."""
        self._to_loggers(version, {f"accuracy/{name}": accuracy})

    def close(self) -> None:
        self._metrics.close()
        for logger in self._loggers:
            logger.close()

    def _to_loggers(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.write(step, values)


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
        self._recorder = SpanRecorder(run_directory / "spans" / "learner.jsonl", "learner", "learner")
        self._supervised = Occupancy(self._recorder, "supervised")
        self._events = EventLog(run_directory / "events.jsonl")
        self._mail = _Mail()
        self._checkpoints = CheckpointDirectory(run_directory / "checkpoints")
        self._start = Start.take(run_directory, self._checkpoints)
        incarnation, version = self._start.incarnation, self._start.version
        hello = Hello("learner", f"learner-{incarnation}-{os.getpid()}", incarnation=incarnation, version=version)
        self._client = BlockingClient(
            hub_address,
            hello,
            handler=self._mail.handle,
            security=client_security(config.hub),
            reconnect_s=config.hub.reconnect_s,
        )
        self._mail.engines = self._mail.engines or self._client.welcome.engines  # a later word wins

    def run(self) -> None:
        try:
            self._client.set_report({"phase": "starting"})
            trainer = Trainer.build(self._config, Path(self._config.model.path), partial(self._progress, "loading"))
            trainer.on_phase = self._recorder.add
            self._recorder.started()
            Start.share(self._start, self._checkpoints, trainer.device)
            clock = ClockKeeper(self._client, self._recorder)
            share = WeightShare.agree(self._config, trainer, own_address(self._hub_address))
            self._publisher = Publisher(
                self._client,
                self._config.weights,
                weight_backend(self._config.weights, trainer.device),
                self._recorder,
                own_address(self._hub_address),
                share.others,
            )
            self._mail.publisher = self._publisher
            self._publisher.set_engines(self._mail.engines)
            self._evaluations = ScheduledEvaluations(
                self._config, self._client, self._events, start=self._start.version
            )
            self._outlet = HubOutlet(
                self._config,
                self._client,
                self._publisher,
                self._events,
                self._evaluations,
                self._run_directory,
                clock,
                self._start.incarnation,
                PublishingOutlet(share, self._publisher, publication_timeout_s(self._config)),
            )
            self._phases(trainer)
            self._client.call(Finish("the run is complete"), call_timeout_s(self._config), retry=True)
        finally:
            self._recorder.close()
            self._events.close()
            if self._mail.publisher is not None:
                self._publisher.close(CLOSE_TIMEOUT_S)
                self._outlet.close()
            self._client.close()

    def _phases(self, trainer: Trainer) -> None:
        config, start = self._config, self._start
        with self._supervised.inside():
            checkpointer = begin_weights(
                config, trainer, start, self._checkpoints, self._outlet.durable, self._warm_start_progress
            )
        self._supervised.close()
        self._outlet.publish(trainer, WeightId(start.incarnation, start.version))
        self._client.set_report({"phase": "waiting for actors"})
        with self._recorder.span("wait_engines"):
            self._publisher.wait_published(start.version, config.actor.startup_timeout_s)
        if config.evaluation.before and start.version == 0:
            self._evaluate("before")
        self._events.write("phase", name="rl", done=False)
        with self._feed(trainer) as feed:
            reached = train(config, trainer, feed, self._outlet, self._recorder, checkpointer, start)
        self._events.write("phase", name="rl", done=True)
        with self._recorder.span("evaluate", evaluation="on schedule"):
            self._evaluations.finish(config.evaluation.timeout_s)
        with self._recorder.span("wait_engines"):
            self._publisher.wait_published(reached, publication_timeout_s(config))
        if config.evaluation.after:
            self._evaluate("after")
        self._client.set_report({"phase": "saving"})
        with self._recorder.span("save"):
            trainer.save_hf(self._run_directory / "checkpoints" / "final", partial(self._progress, "saving"))

    @contextmanager
    def _feed(self, trainer: Trainer) -> Iterator[Feed]:
        def check() -> None:
            self._mail.check()
            self._client.check()
            self._publisher.check()

        config, patience_s = self._config, call_timeout_s(self._config)
        several = dist.get_world_size() > 1
        lease = HubFeed(
            self._client,
            self._start.incarnation,
            config.run.steps,
            config.learner.lease_timeout_s,
            patience_s,
            check,
            payloads=not several,
            time_limit_s=config.run.time_limit_s,
        )
        if several:
            leaders, device = data_parallel_leaders(trainer.device), trainer.device
            incarnation, address = self._start.incarnation, self._client.address
            with fetching_feed(config, address, incarnation, leaders, device, patience_s, lease, check) as feed:
                yield feed
        else:
            yield lease

    def _warm_start_progress(self, phase: str, step: int, steps: int, loss: float) -> None:
        self._mail.check()
        self._supervised.tick()
        self._client.set_report({"phase": phase, "step": step, "steps": steps, "loss": loss})

    def _progress(self, phase: str, done: int, total: int) -> None:
        self._client.set_report({"phase": phase, "step": done, "steps": total})

    def _evaluate(self, name: str) -> None:
        """Every evaluation source, by the actors; the result goes to the event log under its name."""
        wait_s = self._config.evaluation.timeout_s
        for source in self._config.task.evaluation:
            self._client.set_report({"phase": f"evaluation_{name}"})
            config = self._config.evaluation
            message = Evaluate(f"{name}/{source}", source, config.tasks, wait_s, config.samples)
            begun = time.monotonic()
            with self._recorder.span("evaluate", evaluation=name, source=source):
                result = self._client.call(message, wait_s + call_timeout_s(self._config), retry=True)
            assert isinstance(result, EvaluationResult)
            write_result(self._events, name, source, result, config.samples, time.monotonic() - begun)
            self._outlet.log_accuracy(max(0, *result.versions, 0), source, result.accuracy)


def call_timeout_s(config: Config) -> float:
    """For calls that the hub answers at once, or once it was started again."""
    return CALL_TIMEOUT_S + config.hub.reconnect_s


def publication_timeout_s(config: Config) -> float:
    """For a publication to be over: several attempts, and a lone engine that died has to start again first."""
    return config.weights.timeout_s * 4 + config.actor.startup_timeout_s


def begin_weights(
    config: Config,
    trainer: Trainer,
    start: Start,
    directory: CheckpointDirectory,
    on_durable: OnDurable,
    progress: Progress,
) -> Checkpointer:
    """Every rank: bring the trainer to where RL begins or goes on; what writes the checkpoints from there.

    A warm start is made once: where checkpoints are written, the weights that RL starts from are the first.
    """
    start.load(config, trainer, directory)
    checkpointer = Checkpointer(config, trainer, directory, start.incarnation, start.state, on_durable)
    if start.state is None and config.warm_start.steps:
        warm_start(config, trainer, directory.path, progress)
        if config.checkpoint.interval_steps:
            checkpointer.begin(0)
    return checkpointer


def follow(config: Config, hub_address: str, run_directory: Path) -> None:
    """Every rank but the first: the same phases, with nothing to say."""
    name = f"learner-{os.environ['RANK']}"
    checkpoints = CheckpointDirectory(run_directory / "checkpoints")
    with closing(SpanRecorder(run_directory / "spans" / f"{name}.jsonl", name, "learner")) as recorder:
        trainer = Trainer.build(config, Path(config.model.path))
        trainer.on_phase = recorder.add
        recorder.started()
        start = Start.share(None, checkpoints, trainer.device)
        share = WeightShare.agree(config, trainer, own_address(hub_address))
        outlet = SilentOutlet(FollowingOutlet(share, publication_timeout_s(config)))
        with recorder.span("supervised"):
            checkpointer = begin_weights(config, trainer, start, checkpoints, outlet.durable, lambda *_: None)
        outlet.publish(trainer, WeightId(start.incarnation, start.version))  # what RL starts from
        leaders, patience_s = data_parallel_leaders(trainer.device), call_timeout_s(config)
        with fetching_feed(config, hub_address, start.incarnation, leaders, trainer.device, patience_s) as feed:
            train(config, trainer, feed, outlet, recorder, checkpointer, start)
        trainer.save_hf(checkpoints.path / "final")
        share.close()


def run_learner(config: Config, hub_address: str, run_directory: Path) -> None:
    """One rank of the learner; which one, torchrun's environment says (a lone process needs none)."""
    torch.set_num_threads(config.learner.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    if int(os.environ.get("RANK", "0")) == 0:
        Learner(config, hub_address, run_directory).run()
    else:
        follow(config, hub_address, run_directory)
