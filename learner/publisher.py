"""Publishes weights to every engine, on a thread of its own, behind the training loop.

::

    training loop                     publisher thread                         engines (through the hub)
    publish(snapshot, v) ─ returns ─► form the group anew if members changed ─► JoinWeightGroup
    next step …                       prepare ─────────────────────────────────► all acknowledge
                                      pause ───────────────────────────────────► no token is sampled
                                      broadcast, one collective per tensor ────► received, in use
                                      resume ──────────────────────────────────►
                                      tell the hub: Published(v)

Consumes snapshots (at most one waits: the loop cannot run ahead of it by more), and membership changes, which alone
also cause a publication: a joiner gets the current weights even while the learner waits for data. Every phase has
``weights.timeout_s``; an attempt that fails tears the group down and starts over with the engines that live then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from slime_async.config.schema import WeightsConfig
from slime_async.protocol import (
    Drain,
    EngineCommand,
    EngineInfo,
    JoinWeightGroup,
    Message,
    PauseEngine,
    PrepareWeights,
    Published,
    Received,
    ReceiveWeights,
    Relay,
    ResumeEngine,
    WeightManifest,
)
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.errors import ConnectionLost, RemoteError
from slime_async.transport.weight_group import WeightGroup, WeightGroupError, host_group

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
"""Failed attempts at one publication before the run fails: a dead engine costs one, a machine of them a few."""


class PublishError(RuntimeError):
    """The engines could not be brought to the learner's weights."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Whole Hugging Face tensors that nobody writes to any more, and their names in sending order."""

    weights: WeightId
    manifest: WeightManifest
    tensors: tuple[torch.Tensor, ...]


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
    """Owns the weight group; all methods but the thread's own are called from the training loop."""

    def __init__(
        self,
        client: BlockingClient,
        config: WeightsConfig,
        backend: Literal["gloo", "nccl"],
        recorder: SpanRecorder,
        address: str = "127.0.0.1",
    ) -> None:
        """``address`` is this machine's, as the engines see it."""
        self._client = client
        self._config = config
        self._backend = backend
        self._recorder = recorder
        self._address = address
        self._changed = threading.Condition()
        self._engines: tuple[EngineInfo, ...] = ()
        self._pending: Snapshot | None = None
        self._current: Snapshot | None = None
        self._held: tuple[EngineInfo, ...] = ()
        self._published = -1
        self._group: WeightGroup | None = None
        self._epoch = 0
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
            self._leave_group()

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
                self._leave_group()
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
        weights = snapshot.weights
        if self._config.publish == "batch_boundary":
            self._client.call(Drain(self._config.timeout_s), self._config.timeout_s * 2, retry=True)
        joined, group = time.monotonic_ns(), self._join_group(engines)
        preparing = time.monotonic_ns()
        self._tell_all(engines, lambda e: PrepareWeights(e.engine_id, weights))
        paused = time.monotonic_ns()
        self._tell_all(engines, lambda e: PauseEngine(e.engine_id, self._config.pause))
        sent = time.monotonic_ns()
        receiving = self._begin_all(engines, lambda e: ReceiveWeights(e.engine_id, snapshot.manifest, weights))
        names = (spec.name for spec in snapshot.manifest.tensors)
        with self._explained_by(receiving):
            group.send(zip(names, snapshot.tensors, strict=True))
        replies = self._finish_all(receiving)
        received = time.monotonic_ns()
        self._tell_all(engines, lambda e: ResumeEngine(e.engine_id))
        resumed = time.monotonic_ns()
        self._client.call(Published(weights), self._config.timeout_s, retry=True)
        self._recorder.add("publish", begun, resumed, version=weights.version, engines=len(engines))
        phases = {
            "join": (joined, preparing),
            "prepare_sync": (preparing, paused),
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

    def _join_group(self, engines: tuple[EngineInfo, ...]) -> WeightGroup:
        """The group of the learner and exactly these engines; formed anew when the members differ."""
        if self._group is not None and self._held == engines:
            return self._group
        self._leave_group()
        self._epoch += 1
        world_size = 1 + sum(engine.num_ranks for engine in engines)
        spec, store = host_group(
            "weights", self._epoch, world_size, self._backend, self._config.timeout_s, self._address
        )
        offset, joining = 1, []
        for engine in engines:
            joining.append(self._begin(engine, JoinWeightGroup(engine.engine_id, spec, offset)))
            offset += engine.num_ranks
        with self._explained_by(joining):
            self._group = WeightGroup.create(spec, 0)
        del store  # everybody has joined: the group holds the store by itself now
        self._finish_all(joining)
        log.info("weight group %s: %d ranks, engines %s", spec.name, world_size, [e.engine_id for e in engines])
        return self._group

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _begin(self, engine: EngineInfo, command: EngineCommand) -> Future[Message]:
        timeout_s = self._config.timeout_s
        return self._client.begin(Relay(engine.actor, command, timeout_s), timeout_s * 1.5, retry=True)

    def _begin_all(
        self, engines: tuple[EngineInfo, ...], command: Callable[[EngineInfo], EngineCommand]
    ) -> list[Future[Message]]:
        return [self._begin(engine, command(engine)) for engine in engines]

    def _finish_all(self, calls: Sequence[Future[Message]]) -> list[Message]:
        """Wait for every call, then raise the first error: no call is left running behind a new attempt."""
        if errors := self._errors(calls):
            raise errors[0]
        return [call.result() for call in calls]

    def _errors(self, calls: Sequence[Future[Message]]) -> list[BaseException]:
        return [error for call in calls if (error := call.exception(self._config.timeout_s * 2)) is not None]

    @contextmanager
    def _explained_by(self, calls: Sequence[Future[Message]]) -> Iterator[None]:
        """A collective that fails here says only that somebody is missing; the engines' answers say why."""
        try:
            yield
        except WeightGroupError as error:
            answers = "; ".join(map(str, self._errors(calls))) or "nothing"
            raise WeightGroupError(f"{error}; the engines say: {answers}") from error

    def _tell_all(self, engines: tuple[EngineInfo, ...], command: Callable[[EngineInfo], EngineCommand]) -> None:
        self._finish_all(self._begin_all(engines, command))
