"""The hub's process: the queue's state machine behind sockets, and the store of what it holds.

::

      actor ── Deliver ──► ┌──────────────────────────────┐ ◄── Lease ── learner
            ◄─ Granted ─── │ TrajectoryQueue   payloads   │ ── Batch ──►
      observer ─ GetStatus►│ (pure)            (encoded)  │ ◄── Commit, Published
                           └──────────────────────────────┘

Who waits for whom: actors wait for grants (until admission lets them), the learner waits for a batch (until groups
complete), evaluations wait for their results. Every such wait is a coroutine on ``_changed``, which every transition
of the queue sets; each has the caller's deadline. The hub itself waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from slime_async.addresses import connectable
from slime_async.config import Config, ConfigError
from slime_async.protocol import (
    Batch,
    Commit,
    Deliver,
    Delivered,
    Drain,
    Durable,
    Eject,
    Ejected,
    EngineInfo,
    EnginesChanged,
    Evaluate,
    EvaluationResult,
    Failed,
    Fetch,
    Fetched,
    Finish,
    FollowLease,
    GetStatus,
    GetTime,
    Granted,
    Hello,
    HubTime,
    Lease,
    Leaving,
    Membership,
    Message,
    NotReady,
    Ok,
    PeerStatus,
    Published,
    Relay,
    Report,
    RunStatus,
    Shutdown,
    Started,
    StoredTrajectory,
    Welcome,
)
from slime_async.queue import Exhausted, LeasedBatch, TrajectoryMeta
from slime_async.queue.spread import spread_grants
from slime_async.telemetry.process import PROCESS
from slime_async.trajectory import NOT_SAMPLED, Trajectory
from slime_async.transport.codec import ReceivedTrajectory
from slime_async.transport.conversation import Answer
from slime_async.transport.errors import ConnectionLost
from slime_async.transport.failures import Failures
from slime_async.transport.memory import keep_freed_memory
from slime_async.transport.observer import HubObserver
from slime_async.transport.security import server_security
from slime_async.transport.server import Peer, Server
from slime_async.transport.store import Store

log = logging.getLogger(__name__)

RETURN_GRACE_S = 2.0
"""For actors and learner to come back after a restart of the hub; they try ten times a second"""
GOODBYE_WAIT_S = 3.0
"""For actors and learner to leave after they were told to; then the hub goes, and they lose their connection"""
REQUESTS = ("running_requests", "waiting_requests")
"""Of actors' reports, what the hub adds up"""

Result = TypeVar("Result")


class Judge(Protocol):
    """What the configuration's ``task.group_reward`` and ``task.filter`` say of whole groups."""

    async def prepare(self) -> None:
        """Load what it needs, beside the run's start. What it raises ends the run."""

    async def __call__(self, trajectories: Sequence[Trajectory]) -> tuple[list[float], bool]:
        """All trajectories of a group → their rewards, and whether to train on it. It may raise anything."""

    async def close(self) -> None: ...


class LearnerLost(RuntimeError):
    """The learner went away before the run was finished."""


class HubStopped(RuntimeError):
    """The hub was told to stop, by SIGTERM."""


@dataclass(slots=True)
class _Actor:
    """What the hub remembers of one living actor."""

    slots: int
    engines: tuple[EngineInfo, ...]


class Hub:
    """Wires peers to the queue. One instance lives in one event loop; nothing here is shared between threads."""

    def __init__(
        self,
        config: Config,
        run_id: str,
        run_directory: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: HubObserver | None = None,
        judge: Judge | None = None,
    ) -> None:
        """Opens the journal in ``run_directory``, if there is one to be kept, and goes on where it ends.

        ``judge`` is needed where the configuration names ``task.group_reward`` or ``task.filter``. Raises
        ``JournalError``, and ``ValueError`` for keys that cannot be used or a journal of another batch shape.
        """
        self._config = config
        self._observer = observer or HubObserver.silent()
        self._run_id = run_id
        self._clock = clock
        self._store = Store.open(config, run_directory)
        self._queue = self._store.queue
        self._waits_for_old_peers = self._queue.has_begun
        """A restarted hub grants nothing before the actors had time to return with what they work on"""
        self._actors: dict[str, _Actor] = {}
        self._learner: str | None = None
        self._told = self._queue.left_out
        """When the last batch was leased: batches carry the differences"""
        self._failures = Failures(clock)
        assert judge is not None or not self._queue.limits.judge_groups
        self._judge = judge
        self._judging: dict[int, asyncio.Task[None]] = {}
        self._draining = 0
        self._drained = False
        self._changed = asyncio.Event()
        self._members_changed = asyncio.Event()
        self._finished = asyncio.Event()
        self._finish_reason = ""
        self._failure: BaseException | None = None
        self._server = Server(
            config.hub.address,
            on_call=self._on_call,
            on_note=self._on_note,
            on_join=self._on_join,
            on_leave=self._on_leave,
            heartbeat_interval_s=config.hub.heartbeat_interval_s,
            heartbeat_timeout_s=config.hub.heartbeat_timeout_s,
            security=server_security(config.hub),
            insecure=config.hub.insecure,
        )

    @property
    def address(self) -> str:
        return self._server.address

    async def start(self) -> None:
        await self._server.start()

    async def run(self) -> None:
        """Serve until the learner finishes the run. Raises ``LearnerLost`` and whatever a background task died of."""
        serving = asyncio.create_task(self._server.serve(), name="hub server")
        watching = asyncio.create_task(self._watch_for_stalls(), name="hub watchdog")
        telling = asyncio.create_task(self._tell_learner_members(), name="hub members")
        storing = asyncio.create_task(self._store.watch(), name="hub journal")
        returning = asyncio.create_task(self._await_old_peers(), name="hub return")
        sampling = asyncio.create_task(self._sample_regularly(), name="hub samples")
        finishing = asyncio.create_task(self._finished.wait(), name="hub finish")
        running: set[asyncio.Task[Any]] = {serving, watching, telling, sampling, storing, finishing, returning}
        if self._judge is not None:
            running.add(preparing := asyncio.create_task(self._judge.prepare(), name="prepare the judge"))
            preparing.add_done_callback(self._surface)
        try:
            endless = (serving, watching, telling, sampling, storing)
            await asyncio.wait((*endless, finishing), return_when=asyncio.FIRST_COMPLETED)
            for task in endless:
                if task.done():
                    await task
            if self._failure is not None:
                raise self._failure
        finally:
            failed = self._failure is not None or not finishing.done()
            self._tell_everyone(Shutdown(self._finish_reason or "the hub stopped", failed))
            try:
                if finishing.done() and not isinstance(self._failure, HubStopped):
                    await self._until(lambda: not self._actors and self._learner is None, GOODBYE_WAIT_S)
            finally:
                running.update(self._judging.values())
                for task in running:
                    task.cancel()
                try:
                    await asyncio.gather(*running, return_exceptions=True)  # what ended the run is being raised
                finally:
                    self._observer.close()
                    await self._server.close()
                    await self._store.close()

    def stop(self) -> None:
        """End ``run`` with ``HubStopped``: between two transitions, so that the journal never has half of one."""
        self._fail(HubStopped("the hub was told to stop"))

    # ------------------------------------------------------------------------------------------------ membership

    async def _on_join(self, peer: Peer, hello: Hello) -> Welcome:
        """Raises ``ValueError`` to refuse: a second learner, a source that the actors disagree about."""
        if hello.role == "actor":
            self._queue.declare_sources(hello.sources)
            self._actors[peer.name] = _Actor(hello.slots, hello.engines)
            self._queue.adopt(peer.name, hello.running, self._clock())
            log.info("actor %s joined with %d slots and engines %s", peer.name, hello.slots, list(hello.engines))
        if hello.role == "learner":
            if self._learner is not None and self._server.is_alive(self._learner):
                raise ValueError(f"learner {self._learner} is still connected: a run has one; stop it first")
            self._queue.learner_joined(hello.incarnation, hello.version, self._clock())
            self._learner = peer.name
            log.info("learner %s joined: incarnation %d, version %d", peer.name, hello.incarnation, hello.version)
        self._wake()
        await self._store.persist()
        welcome = Welcome(
            self._run_id,
            self._config.hub.heartbeat_interval_s,
            self._config.hub.heartbeat_timeout_s,
            self._queue.published_version,
            self._engines() if hello.role == "learner" else (),
        )
        if hello.role != "observer":  # also a learner that returns, which takes no engines from its welcome
            self._members_changed.set()
        return welcome

    def _on_leave(self, peer: Peer, reason: str) -> None:
        if peer.name in self._actors:
            del self._actors[peer.name]
            returned = self._queue.lose_actor(peer.name, self._clock())
            log.warning("actor %s left (%s); %d reservations return", peer.name, reason, len(returned))
            self._members_changed.set()
        if peer.name == self._learner:
            self._learner = None
            if not self._finished.is_set() and not self._config.learner_restarts:
                self._fail(LearnerLost(f"learner {peer.name} is gone ({reason}) before the run was finished"))
            log.warning("learner %s left (%s)", peer.name, reason)
        self._wake()

    def _engines(self) -> tuple[EngineInfo, ...]:
        return tuple(engine for actor in self._actors.values() for engine in actor.engines)

    async def _eject(self, message: Eject) -> None:
        """From now on the engine is no member; its actor restarts it, and then says so."""
        actor = self._actors.get(message.engine.actor)
        if actor is not None and message.engine in actor.engines:
            log.warning("engine %s is ejected: %s", message.engine.engine_id, message.reason)
            actor.engines = tuple(engine for engine in actor.engines if engine != message.engine)
            self._members_changed.set()
            await self._server.note(message.engine.actor, Ejected(message.engine.engine_id, message.reason))

    async def _tell_learner_members(self) -> None:
        """After every change; a learner that takes no messages hears of the latest once it does."""
        while True:
            await self._members_changed.wait()
            await self._until(lambda: not self._waits_for_old_peers, RETURN_GRACE_S)
            self._members_changed.clear()
            if self._learner is not None:
                with suppress(ConnectionLost):  # the next learner gets them with its welcome
                    await self._server.note(self._learner, Membership(self._engines()))

    async def _await_old_peers(self) -> None:
        """After a restart: a moment for everybody to come back, before others get their work or take them for dead."""
        if self._waits_for_old_peers:
            log.info("went on from the journal: %s", self._queue.waiting_for(self._clock()))
            await asyncio.sleep(RETURN_GRACE_S)
            self._waits_for_old_peers = False
            self._members_changed.set()
            self._wake()

    def _end_if_hopeless(self) -> None:
        if why := self._failures.hopeless:
            self._fail(ConfigError(why))

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._finish_reason = str(error)
        self._finished.set()

    def _tell_everyone(self, message: Message) -> None:
        """Whoever takes no messages now will notice the hub's silence."""
        for name in list(self._server.peers):
            if not self._server.note_nowait(name, message):
                log.warning("%s takes no messages and is not told: %s", name, message)

    # ---------------------------------------------------------------------------------------------------- calls

    def _on_call(self, peer: Peer, message: Message) -> Answer:
        if isinstance(message, Deliver) and not self._store.is_durable:
            return self._deliver(peer, message)  # the most frequent call, and nothing to wait for
        return self._answer_safely(peer, message)

    async def _answer_safely(self, peer: Peer, message: Message) -> Message:
        reply = await self._answer(peer, message)
        await self._store.persist()  # whoever reads the reply relies on it
        return reply

    async def _answer(self, peer: Peer, message: Message) -> Message:
        now = self._clock()
        match message:
            case Deliver():
                return self._deliver(peer, message)
            case Leaving():
                if peer.name in self._actors:
                    self._actors[peer.name].slots = 0
                    log.info("actor %s is leaving: nothing more is granted to it", peer.name)
            case Failed():
                self._queue.fail(message.key, message.attempt, message.reason, now)
                self._failures.episode_failed(message.kind, message.reason, counts=not message.evaluation)
                self._end_if_hopeless()
            case Lease():
                return await self._lease(message)
            case FollowLease():
                return await self._follow_lease(message)
            case Fetch():
                return await self._fetch(message)
            case Commit():
                self._queue.commit(message.incarnation, message.train_version, now)
                self._store.spill(message.train_version)
            case Published():
                self._queue.publish(message.weights.incarnation, message.weights.version, now)
                if not self._config.checkpoint.interval_steps:  # no learner can go back: nothing is trained again
                    self._queue.make_durable(message.weights.incarnation, message.weights.version)
                self._drained = False
            case Durable():
                self._queue.make_durable(message.incarnation, message.version)
            case Drain():
                await self._drain(message)
            case Evaluate():
                return await self._evaluate(message)
            case Eject():
                await self._eject(message)
            case Relay():
                return await self._relay(message)
            case GetStatus():
                return self._status()
            case GetTime():
                return HubTime(self._observer.now_ns)
            case Finish():
                self._finish_reason = message.reason
                self._finished.set()
            case _:
                raise ValueError(f"{type(message).__name__} is no call that the hub answers")
        self._wake()
        return Ok()

    def _on_note(self, peer: Peer, message: Message) -> None:
        match message:
            case Started():
                self._queue.start(message.key, message.attempt, self._clock())
            case EnginesChanged() if peer.name in self._actors:
                self._actors[peer.name].engines = message.engines
                self._members_changed.set()
            case _:
                raise ValueError(f"{type(message).__name__} is no note that the hub takes")

    def _deliver(self, peer: Peer, message: Deliver) -> Delivered:
        trajectory = message.trajectory
        assert isinstance(trajectory, ReceivedTrajectory)
        meta = TrajectoryMeta.of(trajectory, trajectory.encoded.nbytes)
        outcome = self._queue.deliver(meta, peer.name, self._clock())
        self._failures.episode_succeeded()
        if outcome == "accepted" and not message.evaluation:
            self._store.keep(trajectory)
        self._wake()
        return Delivered(outcome)

    async def _lease(self, message: Lease) -> Message:
        def attempt() -> LeasedBatch | None:
            result = self._queue.lease(message.incarnation, message.train_version, self._clock())
            if isinstance(result, Exhausted):
                raise ValueError(result.reason)
            return result if isinstance(result, LeasedBatch) else None

        leased = await self._until(attempt, message.wait_s)
        if leased is None:
            return NotReady(self._queue.waiting_for(self._clock()))
        self._wake()
        left_out, before = self._queue.left_out, self._told
        self._told = left_out
        return Batch(
            message.train_version,
            await self._store.get(leased.keys) if message.payloads else (),
            stale_tokens_dropped=left_out.stale_tokens - before.stale_tokens,
            rewards=leased.rewards,
            groups_filtered=left_out.groups_filtered - before.groups_filtered,
            tokens_filtered=left_out.tokens_filtered - before.tokens_filtered,
            episodes_failed=self._failures.take(),
            stored=() if message.payloads else self._stored(message.train_version),
        )

    async def _follow_lease(self, message: FollowLease) -> Message:
        """Any rank of the learner: which trajectories there are to fetch. What is told once is told to the lease."""
        leased = await self._until(
            lambda: self._queue.leased_batch(message.incarnation, message.train_version), message.wait_s
        )
        if leased is None:
            return NotReady(self._queue.waiting_for(self._clock()))
        return Batch(message.train_version, (), rewards=leased.rewards, stored=self._stored(message.train_version))

    async def _fetch(self, message: Fetch) -> Fetched:
        unknown = set(message.keys).difference(self._queue.batch_keys(message.train_version))
        if unknown:
            raise ValueError(
                f"batch {message.train_version} does not hold {sorted(unknown)[:5]}: lease it, then fetch what it names"
            )
        return Fetched(await self._store.get(message.keys))

    def _stored(self, train_version: int) -> tuple[StoredTrajectory, ...]:
        return tuple(
            StoredTrajectory(
                meta.key,
                meta.num_tokens,
                meta.size_bytes,
                meta.tokens_by_version[0][0] if meta.tokens_by_version else NOT_SAMPLED,
                meta.tokens_by_version[-1][0] if meta.tokens_by_version else NOT_SAMPLED,
                meta.reward,
            )
            for meta in self._queue.batch_metas(train_version)
        )

    async def _relay(self, message: Relay) -> Message:
        """After a restart, the actor may be on its way back."""
        deadline = self._clock() + message.wait_s
        await self._until(lambda: message.actor in self._actors or not self._waits_for_old_peers, message.wait_s)
        return await self._server.call(message.actor, message.message, max(0.0, deadline - self._clock()))

    async def _drain(self, message: Drain) -> None:
        """Once drained, nothing is granted until the weights that this was for are published."""
        self._draining += 1
        try:
            self._drained = bool(await self._until(lambda: self._outstanding() == 0, message.wait_s))
            if not self._drained:
                raise ValueError(f"{self._outstanding()} trajectories still run after {message.wait_s:.0f} s")
        finally:
            self._draining -= 1
            self._wake()

    async def _evaluate(self, message: Evaluate) -> EvaluationResult:
        self._queue.evaluate(
            message.name,
            message.source,
            message.num_tasks,
            self._clock(),
            samples=message.samples,
            share=message.share,
        )
        self._wake()
        result = await self._until(lambda: self._queue.evaluation_result(message.name), message.wait_s)
        if result is None:
            raise ValueError(
                f"evaluation {message.name} did not finish within {message.wait_s:.0f} s: "
                f"{self._queue.waiting_for(self._clock())}"
            )
        return result

    def _outstanding(self) -> int:
        return sum(self._queue.outstanding(name) for name in self._actors)

    def _status(self) -> RunStatus:
        now = self._clock()
        peers = tuple(PeerStatus(p.role, p.name, p.silent_s, p.report) for p in self._server.peers.values())
        statistics = self._queue.statistics(now).as_report()
        queue: Report = {**statistics, **self._store.as_report(), "waiting_for": self._queue.waiting_for(now)}
        return RunStatus(self._run_id, queue, peers, PROCESS.about())

    # ------------------------------------------------------------------------------------------------- movement

    def _wake(self) -> None:
        """Something changed: hand out what may be handed out now, free what is no longer needed, wake who waits."""
        held_back = self._draining or self._drained
        if not held_back and not self._waits_for_old_peers and not self._finished.is_set():
            self._grant()
        self._observer.gate("drain" if held_back else self._queue.admission_closed_by())
        self._store.stage()
        self._judge_complete_groups()
        self._changed.set()
        self._changed = asyncio.Event()

    def _judge_complete_groups(self) -> None:
        for serial in () if self._finished.is_set() else self._queue.groups_to_judge():
            if serial not in self._judging:
                self._judging[serial] = asyncio.create_task(self._judge_group(serial), name=f"judge group {serial}")
                self._judging[serial].add_done_callback(self._surface)

    def _surface(self, judging: asyncio.Task[None]) -> None:
        """What no single group is to blame for (functions that cannot be loaded, a damaged journal) ends the run."""
        if not judging.cancelled() and (error := judging.exception()) is not None:
            self._fail(error)

    async def _judge_group(self, serial: int) -> None:
        """Whatever the user's functions raise ends this group and is counted; the run only when nothing else comes."""
        assert self._judge is not None
        trajectories = await self._store.get(self._queue.group_keys(serial))
        try:
            rewards, keep = await self._judge(trajectories)
            self._queue.judge(serial, rewards, keep, self._clock())
            self._failures.group_succeeded()
        except Exception as error:  # user code may raise anything
            log.warning("the judge of group %d failed", serial, exc_info=error)
            self._failures.group_failed(len(trajectories), str(error))
            self._queue.give_up_group(serial, f"judge: {error}", self._clock())
            self._end_if_hopeless()
        del self._judging[serial]
        self._wake()

    def _grant(self) -> None:
        now = self._clock()
        free = {name: actor.slots - self._queue.outstanding(name) for name, actor in self._actors.items()}
        slots = {name: actor.slots for name, actor in self._actors.items()}
        for name, reservations in spread_grants(self._queue, free, slots, now).items():
            if not self._server.note_nowait(name, Granted(tuple(reservations))):
                for reservation in reservations:  # its outbox is full: it cannot be told, so it does not hold them
                    self._queue.fail(reservation.key, reservation.attempt, f"{name} takes no messages", now)

    async def _until(self, ready: Callable[[], Result | None], wait_s: float) -> Result | None:
        """``ready()`` once it is truthy, asked again after every change; None when ``wait_s`` is over first."""
        deadline = self._clock() + wait_s
        while not (result := ready()):
            changed, left = self._changed, deadline - self._clock()
            if left <= 0:
                return None
            try:
                async with asyncio.timeout(left):  # wait_for may swallow a cancellation that comes with the change
                    await changed.wait()
            except TimeoutError:
                return ready() or None
        return result

    def _requests(self) -> Report:
        """Of all actors, by their latest reports."""
        told = [peer.report for name, peer in self._server.peers.items() if name in self._actors]
        return {name: sum(n for report in told if type(n := report.get(name)) is int) for name in REQUESTS}

    async def _sample_regularly(self) -> None:
        """How full the queue is, for the report."""
        while True:
            statistics = {**self._queue.statistics(self._clock()).as_report(), **self._requests()}
            self._observer.sample(statistics)
            PROCESS.tell("queue", {**statistics, **self._store.as_report(), "actors": len(self._actors)})
            await asyncio.sleep(self._config.hub.heartbeat_interval_s)

    async def _watch_for_stalls(self) -> None:
        """When nothing has changed for ``hub.stall_timeout_s``, say in the log what everybody waits for."""
        while True:
            changed = self._changed
            try:
                async with asyncio.timeout(self._config.hub.stall_timeout_s):
                    await changed.wait()
            except TimeoutError:
                log.warning(
                    "nothing moved for %.0f s: %s",
                    self._config.hub.stall_timeout_s,
                    self._queue.waiting_for(self._clock()),
                )


def run_hub(config: Config, run_directory: Path, ready_file: Path, judge: Judge | None = None) -> None:
    """The hub's process: writes its address to ``ready_file`` once it listens, and returns when the run is over.

    ``judge`` as in ``Hub``. Raises ``ConfigError`` for what the user must change before it can listen,
    ``JournalError``, ``LearnerLost`` and, at SIGTERM, ``HubStopped``.
    """
    import uvloop

    keep_freed_memory()

    async def main() -> None:
        observer = HubObserver.of_run(run_directory)
        try:
            hub = Hub(config, run_directory.name, run_directory, observer=observer, judge=judge)
            await hub.start()
        except OSError as error:
            raise ConfigError(f"hub.address = {config.hub.address!r}: {error}; take another port, or 0") from error
        except ValueError as error:  # keys, or a journal of another batch shape
            raise ConfigError(str(error)) from error
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, hub.stop)
        observer.listening()
        partial = ready_file.with_suffix(".partial")
        partial.write_text(connectable(hub.address))
        partial.rename(ready_file)
        log.info("listening on %s", hub.address)
        try:
            await hub.run()
        finally:
            if judge is not None:
                await judge.close()

    uvloop.run(main())
