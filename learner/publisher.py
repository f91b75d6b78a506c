"""Publishes weights to every engine, on a thread of its own, behind the training loop.

::

    training loop                     publisher thread                         engines (through the hub)
    publish(snapshot, v) ─ returns ─► prepare ─────────────────────────────────► all are well
    fill the snapshot                 form the group anew if members changed ─► JoinWeightGroup
    next step …                       pause ───────────────────────────────────► no token is sampled
                                      broadcast, one collective per tensor ────► received, in use
                                      resume ──────────────────────────────────►
                                      tell the hub: Published(v)

Consumes snapshots (at most one waits: the loop cannot run ahead of it by more), and membership changes, which alone
also cause a publication: a joiner gets the current weights even while the learner waits for data. Every phase has
``weights.timeout_s``; an attempt that fails tears the group down, ejects whoever did not answer, and starts over with
the engines that live then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slime_async.config.schema import WeightsConfig
from slime_async.learner.carriers import Backend, Carrier, make_carrier
from slime_async.learner.commands import EngineCommands
from slime_async.learner.snapshots import Snapshot
from slime_async.learner.source_ranks import OtherSource
from slime_async.protocol import (
    Drain,
    EngineInfo,
    PauseEngine,
    PrepareWeights,
    Published,
    Received,
    ResumeEngine,
)
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.errors import ConnectionLost, RemoteError
from slime_async.transport.weight_group import WeightGroupError

__all__ = ["PublishError", "PublishTimes", "Publisher", "Snapshot"]

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
"""Failed attempts at one publication before the run fails: a dead engine costs one, a machine of them a few."""


class PublishError(RuntimeError):
    """The engines could not be brought to the learner's weights."""


@dataclass(frozen=True, slots=True)
class PublishTimes:
    """How long one publication took, in seconds."""

    weights: WeightId
    total_s: float
    pause_to_resume_s: float
    broadcast_s: float
    engines: int
    requests_in_flight: int
    """In all engines, when the weights changed"""


class Publisher:
    """Owns what carries the weights; all methods but the thread's own are called from the training loop."""

    def __init__(
        self,
        client: BlockingClient,
        config: WeightsConfig,
        backend: Backend,
        recorder: SpanRecorder,
        address: str = "127.0.0.1",
        others: Sequence[OtherSource] = (),
    ) -> None:
        """``address`` is where engines can reach this process; ``others`` send parts of the weights beside it."""
        self._client = client
        self._config = config
        self._recorder = recorder
        self._changed = threading.Condition()
        self._engines: tuple[EngineInfo, ...] = ()
        self._pending: Snapshot | None = None
        self._current: Snapshot | None = None
        self._held: tuple[EngineInfo, ...] = ()
        self._published = -1
        self._commands = EngineCommands(client, config)
        self._carrier: Carrier = make_carrier(self._commands, config, backend, address, others)
        self._closing = False
        self._failure: BaseException | None = None
        self._times: list[PublishTimes] = []
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------- the training loop's side

    def set_engines(self, engines: Sequence[EngineInfo]) -> None:
        """The hub's latest word on which engines live. Callable from any thread."""
        with self._changed:
            self._engines = tuple(engines)
            self._changed.notify_all()

    def publish(self, snapshot: Snapshot, timeout_s: float) -> float:
        """Hand over weights; returns the seconds this had to wait for the publication before it to begin.

        Raises ``PublishError`` when the thread failed, ``TimeoutError`` when it does not take the snapshot in time.
        """
        begun = time.monotonic()
        with self._changed:
            self._wait(lambda: self._pending is None, timeout_s, f"publication of version {snapshot.weights.version}")
            self._pending = snapshot
            self._changed.notify_all()
        return time.monotonic() - begun

    def wait_published(self, version: int, timeout_s: float) -> None:
        """Until at least one engine holds ``version`` and the hub knows it."""
        with self._changed:
            self._wait(
                lambda: self._published >= version and bool(self._held),
                timeout_s,
                f"an engine to take version {version}; engines known: {[e.engine_id for e in self._engines]}",
            )

    def check(self) -> None:
        """Raise what the thread died of, if it did."""
        if self._failure is not None:
            raise PublishError(f"the publisher failed: {self._failure}") from self._failure

    @property
    def published(self) -> int:
        """The version that all engines hold; −1 before the first"""
        return self._published

    def take_times(self) -> list[PublishTimes]:
        """Publications finished since the last call."""
        with self._changed:
            times, self._times = self._times, []
        return times

    def close(self, timeout_s: float = 10.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("the publisher is still in a broadcast after %.0f s; leaving it behind", timeout_s)

    def _wait(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        done = self._changed.wait_for(lambda: ready() or self._failure is not None, timeout_s)
        self.check()
        if not done:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")

    # --------------------------------------------------------------------------------------------- the thread's side

    def _run(self) -> None:
        try:
            while (snapshot := self._next()) is not None:
                self._publish_until_done(snapshot)
        except BaseException as error:
            log.exception("publishing failed")
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            self._carrier.close()

    def _next(self) -> Snapshot | None:
        """The next thing to send: a new snapshot, or the current one because members changed. None: closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._something_to_send())
            if self._closing:
                return None
            if self._pending is not None:
                self._current, self._pending = self._pending, None
                self._changed.notify_all()
            return self._current

    def _something_to_send(self) -> bool:
        if not self._engines:
            return False
        joined = set(self._engines) - set(self._held)
        return self._pending is not None or (self._current is not None and bool(joined))

    def _publish_until_done(self, snapshot: Snapshot) -> None:
        problem = ""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            with self._changed:
                engines = self._engines
                if self._closing or not engines:
                    self._held = ()
                    return
            try:
                times = self._publish_once(snapshot, engines)
            except (ConnectionLost, RemoteError, WeightGroupError, TimeoutError) as error:
                problem = str(error)
                log.warning("publishing version %d, attempt %d: %s", snapshot.weights.version, attempt, problem)
                self._carrier.close()
                self._commands.eject_silent()
                self._await_change(engines)
                continue
            with self._changed:
                self._held = engines
                self._published = snapshot.weights.version
                self._times.append(times)
                self._changed.notify_all()
            return
        version = snapshot.weights.version
        raise PublishError(f"version {version} could not be published in {MAX_ATTEMPTS} attempts; the last: {problem}")

    def _await_change(self, engines: tuple[EngineInfo, ...]) -> None:
        """After a failure: give the hub a moment to notice who died before the same engines are tried again."""
        with self._changed:
            self._held = ()
            self._changed.wait_for(lambda: self._closing or self._engines != engines, self._config.timeout_s / 4)

    def _publish_once(self, snapshot: Snapshot, engines: tuple[EngineInfo, ...]) -> PublishTimes:
        begun = time.monotonic_ns()
        weights, commands = snapshot.weights, self._commands
        if self._config.publish == "batch_boundary":
            self._client.call(Drain(self._config.timeout_s), self._config.timeout_s * 2, retry=True)
        preparing = time.monotonic_ns()
        manifest = self._carrier.manifest(snapshot)
        commands.tell(engines, lambda e: PrepareWeights(e.engine_id, weights, manifest))
        joining = time.monotonic_ns()
        self._carrier.connect(engines)
        converting = time.monotonic_ns()
        self._carrier.wait_queued(snapshot)  # beside the thread that queues them broadcasts would be slower
        paused = time.monotonic_ns()
        commands.tell(engines, lambda e: PauseEngine(e.engine_id, self._config.pause))
        sent = time.monotonic_ns()
        replies = self._carrier.send(snapshot, engines)
        received = time.monotonic_ns()
        commands.tell(engines, lambda e: ResumeEngine(e.engine_id))
        resumed = time.monotonic_ns()
        self._client.call(Published(weights), self._config.timeout_s, retry=True)
        self._recorder.add("publish", begun, resumed, version=weights.version, engines=len(engines))
        phases = {
            "prepare_sync": (preparing, joining),
            "join": (joining, converting),
            "convert": (converting, paused),
            "pause": (paused, sent),
            "broadcast": (sent, received),
            "resume": (received, resumed),
        }
        for name, (start, end) in phases.items():
            self._recorder.add(name, start, end, version=weights.version)
        return PublishTimes(
            weights=weights,
            total_s=(resumed - begun) / 1e9,
            pause_to_resume_s=(resumed - paused) / 1e9,
            broadcast_s=(received - sent) / 1e9,
            engines=len(engines),
            requests_in_flight=sum(reply.requests_in_flight for reply in replies if isinstance(reply, Received)),
        )
