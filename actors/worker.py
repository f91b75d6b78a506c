"""The actor's process: takes grants, plays episodes, delivers trajectories, and obeys the learner's weight commands.

::

    hub ── Granted ──► rollout tasks (at most ``slots``) ── generate ──► engine pool ──► engines (threads or servers)
        ◄─ Deliver ──      one coroutine per reservation
        ── JoinWeightGroup, Pause, Receive, Resume ────────────────────────────────────► one of its engines
        ◄─ EnginesChanged ── an engine died, or came up again ──────────── engine pool

Consumes grants; waits for the engine, the environment and the hub's acknowledgement; unblocked by weights (an engine
without weights samples nothing) and by admission; produces trajectories. The role ends when the hub says so, with
the first background task that fails, or when it is told to leave: then it takes nothing new, finishes what it has begun
as long as ``actor.drain_timeout_s`` allows, and returns the rest.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvloop

from slime_async.actors.engine import Engine, EngineError, PauseMode
from slime_async.actors.engines import make_pool
from slime_async.actors.loop_watch import LoopWatch
from slime_async.actors.pool import EnginePool
from slime_async.actors.rollout import Rollout, RolloutFailure, make_rollout
from slime_async.actors.spans import ActorSpans
from slime_async.config import Config
from slime_async.protocol import (
    Deliver,
    Ejected,
    EngineCommand,
    EngineInfo,
    EnginesChanged,
    Failed,
    Granted,
    Hello,
    JoinWeightGroup,
    Leaving,
    Message,
    Ok,
    PauseEngine,
    PrepareWeights,
    Received,
    ReceiveWeights,
    Report,
    Reservation,
    ResumeEngine,
    Shutdown,
    Started,
)
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import Trajectory, TrajectoryKey
from slime_async.transport.client import HubClient
from slime_async.transport.clock import keep_aligned
from slime_async.transport.errors import BadMessage, ConnectionLost, RemoteError
from slime_async.transport.memory import keep_freed_memory
from slime_async.transport.security import client_security
from slime_async.transport.weight_group import WeightGroupError

log = logging.getLogger(__name__)

DELIVERY_TIMEOUT_S = 120.0
"""A trajectory that a hub which is there has not acknowledged by then fails the actor: another is granted it."""


LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""A scheduler's notice: Kubernetes and most others send the first, Slurm may be told to send the second"""


class RunOver(Exception):
    """The hub said that the run is over."""


class Left(Exception):
    """We were told to leave, and have finished what could be finished."""


class RunEnded(RuntimeError):
    """The hub said that the run has failed, and why."""


class Worker:
    """One actor: one engine pool, one connection, and a coroutine per reservation."""

    def __init__(
        self,
        config: Config,
        name: str,
        pool: EnginePool,
        rollout: Rollout,
        recorder: SpanRecorder | None = None,
    ) -> None:
        self._config = config
        self._spans = ActorSpans(recorder or SpanRecorder(None, name))
        self._name = name
        self._pool = pool
        self._rollout = rollout
        self._shutdown: asyncio.Future[Shutdown] = asyncio.get_running_loop().create_future()
        self._client: HubClient | None = None
        self._granted: asyncio.Queue[Reservation] = asyncio.Queue()
        self._held: dict[tuple[TrajectoryKey, int], Reservation] = {}
        """Granted, and neither delivered nor failed: what this actor tells a hub that it comes back to"""
        self._idle = asyncio.Event()
        """Nothing is held"""
        self._idle.set()
        self._publishing: set[str] = set()
        """Engines that a publication under way counts on"""
        self._settled = asyncio.Event()
        """There are none"""
        self._settled.set()
        self._told_to_leave = asyncio.Event()
        self._patience: asyncio.Timeout | None = None
        self._latest: dict[str, tuple[EngineCommand, asyncio.Task[Message]]] = {}
        """The learner's latest command to each engine: it comes again when its answer was lost with a connection"""

    def leave(self) -> None:
        """Finish what has begun, and go; at once when this is called again."""
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())
        self._told_to_leave.set()

    async def run(self, hub_address: str, leave_on: Iterable[signal.Signals] = ()) -> bool:
        """Until the hub says that the run is over (False), or until it has left as it was told (True).

        Once it has joined, ``leave_on`` call ``leave``. Raises what broke: the connection, the engines, a bug of ours.
        """
        try:
            await self._pool.start()
            return await self._serve(hub_address, leave_on)
        finally:
            await self._rollout.close()
            await self._pool.close()

    async def _serve(self, hub_address: str, leave_on: Iterable[signal.Signals]) -> bool:
        hello = Hello(
            role="actor",
            name=self._name,
            slots=self._config.actor.slots,
            engines=self._pool.infos,
            sources=self._rollout.source_sizes,
        )
        hub = self._config.hub
        self._client = await HubClient.connect(
            hub_address,
            hello,
            handler=self._handle,
            security=client_security(hub),
            reconnect_s=hub.reconnect_s,
            refreshed_hello=lambda: replace(
                hello,
                engines=self._pool.infos,
                running=tuple(self._held.values()),
                slots=0 if self._told_to_leave.is_set() else hello.slots,
            ),
        )
        for number in leave_on:
            asyncio.get_running_loop().add_signal_handler(number, self.leave)
        left = False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._client.wait_closed(), name="hub connection")
                tasks.create_task(self._pool.run(), name="engine pool")
                tasks.create_task(self._tell_of_engines(self._client, hello.engines), name="engines")
                tasks.create_task(self._report_regularly(self._client), name="report")
                tasks.create_task(keep_aligned(self._client, self._spans.recorder), name="clock")
                tasks.create_task(self._end_when_told(), name="shutdown")
                tasks.create_task(self._leave_when_told(), name="leave")
                tasks.create_task(self._play_what_is_granted(tasks), name="grants")
        except* RunOver:
            log.info("the run is over")
        except* Left:
            left = True
        finally:
            for _, command in self._latest.values():
                command.cancel()
            await self._client.close()
            self._spans.close()
        return left

    async def _leave_when_told(self) -> None:
        """*Waits for* the word to leave; *unblocked by* the last delivery, or by time."""
        assert self._client is not None
        await self._told_to_leave.wait()
        log.info("leaving: %d episodes to finish", len(self._held))
        try:
            async with asyncio.timeout(self._config.actor.drain_timeout_s) as self._patience:
                await self._client.call(Leaving(), self._delivery_timeout_s, retry=True)
                await self._idle.wait()
                await self._settled.wait()
        except TimeoutError:
            log.warning("leaving with %d episodes unfinished: they are generated elsewhere", len(self._held))
        raise Left

    async def _end_when_told(self) -> None:
        shutdown = await self._shutdown
        if shutdown.failed:
            raise RunEnded(f"the hub ended the run: {shutdown.reason}")
        raise RunOver

    # --------------------------------------------------------------------------------------- what the hub sends

    async def _handle(self, message: Message) -> Message | None:
        match message:
            case Granted():
                for reservation in message.reservations:
                    self._held[reservation.key, reservation.attempt] = reservation
                    self._idle.clear()
                    self._granted.put_nowait(reservation)
                return None
            case Shutdown():
                if not self._shutdown.done():
                    self._shutdown.set_result(message)
                return None
            case Ejected():
                self._pool.restart(message.engine_id, message.reason)
                return None
            case JoinWeightGroup() | PrepareWeights() | PauseEngine() | ReceiveWeights() | ResumeEngine():
                return await self._once(message)
            case _:
                raise ValueError(f"{type(message).__name__} is nothing that an actor does")

    async def _once(self, command: EngineCommand) -> Message:
        """Carry out a command, or wait for its outcome if it is the engine's latest come again.

        A failure is the learner's to handle, and what failed is tried when it is asked for again.
        """
        self._pool.member(command.engine_id)
        latest, running = self._latest.get(command.engine_id, (None, None))
        if running is None or latest != command or (running.done() and running.exception() is not None):
            running = asyncio.create_task(self._command(command), name=type(command).__name__)
            running.add_done_callback(lambda done: done.cancelled() or done.exception())  # told to whoever asks for it
            self._latest[command.engine_id] = command, running
        try:
            return await asyncio.shield(running)
        except (EngineError, WeightGroupError, TimeoutError) as failed:
            log.warning("%s failed: %s", type(command).__name__, failed)
            raise RemoteError(type(failed).__name__, str(failed)) from failed

    async def _command(self, command: EngineCommand) -> Message:
        if isinstance(command, JoinWeightGroup | PrepareWeights):
            self._publishing.add(command.engine_id)
            self._settled.clear()
        if isinstance(command, PauseEngine):
            self._spans.pause()
        reply = await self._pool.command(
            command.engine_id, partial(obey, command), self._config.weights.command_timeout_s
        )
        if isinstance(command, ReceiveWeights):
            self._spans.received_weights()
        elif isinstance(command, ResumeEngine):
            self._spans.resume()
            self._publishing.discard(command.engine_id)
            if not self._publishing:
                self._settled.set()
        return reply

    async def _tell_of_engines(self, client: HubClient, told: tuple[EngineInfo, ...]) -> None:
        """Consumes the pool's changes; the hub then tells the learner, which brings weights to those who lack them.

        A hub that is away meanwhile hears of them with our Hello.
        """
        changed = asyncio.Event()
        self._pool.on_change = lambda _: changed.set()
        while True:
            if (engines := self._pool.infos) != told:
                with suppress(ConnectionLost):
                    await client.note(EnginesChanged(engines))
                told = engines
            await changed.wait()
            changed.clear()

    @property
    def _delivery_timeout_s(self) -> float:
        return DELIVERY_TIMEOUT_S + self._config.hub.reconnect_s

    # --------------------------------------------------------------------------------------------------- rollouts

    async def _play_what_is_granted(self, tasks: asyncio.TaskGroup) -> None:
        """Consumes grants; starts nothing once the role is ending."""
        while True:
            reservation = await self._granted.get()
            tasks.create_task(self._play(reservation), name=f"rollout {reservation.key}")

    async def _play(self, reservation: Reservation) -> None:
        """One reservation, to its delivery or its failure; both are told to the hub, and the hub grants anew."""
        assert self._client is not None
        with self._spans.occupied.inside():
            with self._spans.episodes.inside():
                with suppress(ConnectionLost):  # a hub that comes back hears of it with our Hello
                    await self._client.note(Started(reservation.key, reservation.attempt))
                outcome = await self._rollout.run(reservation)
            with self._spans.deliveries.inside():
                if isinstance(outcome, RolloutFailure):
                    reason, kind = outcome.reason, outcome.kind
                else:
                    reason, kind = await self._deliver(outcome, reservation), "delivery"
                if reason:
                    failed = Failed(reservation.key, reservation.attempt, reason, reservation.evaluation, kind)
                    await self._client.call(failed, self._delivery_timeout_s, retry=True)
        self._held.pop((reservation.key, reservation.attempt), None)
        if not self._held:
            self._idle.set()

    async def _deliver(self, trajectory: Trajectory, reservation: Reservation) -> str:
        """Why the hub does not take it (too large, most likely); empty when it does."""
        assert self._client is not None
        if self._config.actor.delay_s and not reservation.evaluation:
            await asyncio.sleep(self._config.actor.delay_s)
        try:
            await self._client.call(Deliver(trajectory, reservation.evaluation), self._delivery_timeout_s, retry=True)
        except BadMessage as error:  # refused on this side of the wire
            return f"BadMessage: {error}"
        except RemoteError as error:
            if error.code not in ("ValueError", "BadMessage"):
                raise
            return str(error)
        return ""

    # ---------------------------------------------------------------------------------------------------- reports

    async def _report_regularly(self, client: HubClient) -> None:
        """What the live view shows of this actor, with each heartbeat."""
        interval_s = client.welcome.heartbeat_interval_s
        tokens, at = 0, time.monotonic()
        while True:
            await asyncio.sleep(interval_s)
            status = await self._pool.status()
            now = time.monotonic()
            report: Report = {
                "engines": len(self._pool.infos),
                "engine_deaths": self._pool.deaths,
                "weight_version": status.weights.version if status.weights else -1,
                "running_requests": status.running_requests,
                "waiting_requests": status.waiting_requests,
                "generated_tokens": status.generated_tokens,
                "actor_tokens_per_s": (status.generated_tokens - tokens) / (now - at),
                **self._rollout.report(),
            }
            client.set_report(report)
            tokens, at = status.generated_tokens, now


async def obey(command: EngineCommand, engine: Engine) -> Message:
    """One of the learner's commands, done."""
    match command:
        case PrepareWeights():
            await engine.check_health()
            await engine.check_weights(command.manifest)
        case JoinWeightGroup():
            await engine.join_weight_group(command.spec, command.rank_offset, command.others)
        case PauseEngine():
            await engine.pause(PauseMode(command.mode))
        case ReceiveWeights():
            await engine.receive_weights(
                command.manifest, command.weights, command.shared, command.shares, command.buffer_bytes
            )
            return Received(engine.in_flight_at_update)
        case ResumeEngine():
            await engine.resume()
    return Ok()


def run_actor(config: Config, name: str, hub_address: str, run_directory: Path) -> bool:
    """The actor's process. Returns when the hub says that the run is over, or True when it left before, as told."""
    keep_freed_memory()
    return uvloop.run(_main(config, name, hub_address, run_directory))


async def _main(config: Config, name: str, hub_address: str, run_directory: Path) -> bool:
    checkpoint = Path(config.model.path)
    with closing(SpanRecorder(run_directory / "spans" / f"{name}.jsonl", name, "actor")) as recorder:
        pool = make_pool(config, name, run_directory / "logs", recorder)
        rollout = make_rollout(config, checkpoint, pool)
        async with LoopWatch():
            return await Worker(config, name, pool, rollout, recorder).run(hub_address, LEAVE_SIGNALS)
