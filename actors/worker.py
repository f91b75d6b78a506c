"""The actor's process: takes grants, plays episodes, delivers trajectories, and obeys the learner's weight commands.

::

    hub ── Granted ──► rollout tasks (at most ``slots``) ── generate ──► engine (its own thread or server)
        ◄─ Deliver ──      one coroutine per reservation
        ── JoinWeightGroup, Pause, Receive, Resume ─────────────────────► engine

Consumes grants; waits for the engine, the environment and the hub's acknowledgement; unblocked by weights (an engine
without weights samples nothing) and by admission; produces trajectories. The role ends when the hub says so, or with
the first background task that fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import uvloop

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import EngineError, PauseMode
from slime_async.actors.loop_watch import LoopWatch
from slime_async.actors.rollout import Rollout, RolloutFailure, make_rollout
from slime_async.actors.spans import ActorSpans
from slime_async.config import Config
from slime_async.protocol import (
    Deliver,
    EngineInfo,
    Failed,
    Granted,
    Hello,
    JoinWeightGroup,
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
from slime_async.transport.security import client_security
from slime_async.transport.weight_group import WeightGroupError

log = logging.getLogger(__name__)

DELIVERY_TIMEOUT_S = 120.0
"""A trajectory that a hub which is there has not acknowledged by then fails the actor: another is granted it."""


class RunOver(Exception):
    """The hub said that the run is over."""


class RunEnded(RuntimeError):
    """The hub said that the run has failed, and why."""


class Worker:
    """One actor: one engine, one connection, and a coroutine per reservation."""

    def __init__(
        self,
        config: Config,
        name: str,
        engine: EmbeddedEngine,
        rollout: Rollout,
        recorder: SpanRecorder | None = None,
    ) -> None:
        self._config = config
        self._spans = ActorSpans(recorder or SpanRecorder(None, name))
        self._name = name
        self._engine = engine
        self._rollout = rollout
        self._shutdown: asyncio.Future[Shutdown] = asyncio.get_running_loop().create_future()
        self._client: HubClient | None = None
        self._granted: asyncio.Queue[Reservation] = asyncio.Queue()
        self._held: dict[tuple[TrajectoryKey, int], Reservation] = {}
        """Granted, and neither delivered nor failed: what this actor tells a hub that it comes back to"""
        self._latest: tuple[Message, asyncio.Task[Message]] | None = None
        """The learner's latest command: it comes again when its answer was lost with a connection"""

    async def run(self, hub_address: str) -> None:
        """Until the hub says that the run is over. Raises what broke: the connection, the engine, or a bug of ours."""
        await asyncio.wait_for(self._engine.start(), self._config.actor.startup_timeout_s)
        hello = Hello(
            role="actor",
            name=self._name,
            slots=self._config.actor.slots,
            engines=(EngineInfo(self._engine.engine_id, self._name, self._engine.num_ranks),),
            sources=self._rollout.source_sizes,
        )
        hub = self._config.hub
        self._client = await HubClient.connect(
            hub_address,
            hello,
            handler=self._handle,
            security=client_security(hub),
            reconnect_s=hub.reconnect_s,
            refreshed_hello=lambda: replace(hello, running=tuple(self._held.values())),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._client.wait_closed(), name="hub connection")
                tasks.create_task(self._report_regularly(self._client), name="report")
                tasks.create_task(keep_aligned(self._client, self._spans.recorder), name="clock")
                tasks.create_task(self._end_when_told(), name="shutdown")
                tasks.create_task(self._play_what_is_granted(tasks), name="grants")
        except* RunOver:
            log.info("the run is over")
        finally:
            if self._latest is not None:
                self._latest[1].cancel()
            await self._client.close()
            await self._rollout.close()
            await self._engine.close()
            self._spans.close()

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
                    self._granted.put_nowait(reservation)
                return None
            case Shutdown():
                if not self._shutdown.done():
                    self._shutdown.set_result(message)
                return None
        try:
            return await self._once(message)
        except (EngineError, WeightGroupError) as failed:  # the learner's to handle; a dead engine ends its rollouts
            log.warning("%s failed: %s", type(message).__name__, failed)
            raise RemoteError(type(failed).__name__, str(failed)) from failed

    async def _once(self, message: Message) -> Message:
        """Carry out a command, or wait for its outcome if it is the latest one come again."""
        if self._latest is None or self._latest[0] != message:
            task = asyncio.create_task(self._command(message), name=type(message).__name__)
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # told to whoever asks for it
            self._latest = message, task
        return await asyncio.shield(self._latest[1])

    async def _command(self, message: Message) -> Message:
        """What the learner asks of the engine."""
        self._check_engine(message)
        match message:
            case PrepareWeights():
                await self._engine.status()
            case JoinWeightGroup():
                await self._engine.join_weight_group(message.spec, message.rank_offset)
            case PauseEngine():
                self._spans.pause()
                await self._engine.pause(PauseMode(message.mode))
            case ReceiveWeights():
                await self._engine.receive_weights(message.manifest, message.weights)
                self._spans.received_weights()
                return Received(self._engine.in_flight_at_update)
            case ResumeEngine():
                await self._engine.resume()
                self._spans.resume()
            case _:
                raise ValueError(f"{type(message).__name__} is nothing that an actor does")
        return Ok()

    def _check_engine(self, message: Message) -> None:
        wanted = getattr(message, "engine_id", self._engine.engine_id)
        if wanted != self._engine.engine_id:
            raise ValueError(f"actor {self._name} holds engine {self._engine.engine_id}, not {wanted}")

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
            status = await self._engine.status()
            now = time.monotonic()
            report: Report = {
                "engine": self._engine.engine_id,
                "weight_version": status.weights.version if status.weights else -1,
                "running_requests": status.running_requests,
                "waiting_requests": status.waiting_requests,
                "generated_tokens": status.generated_tokens,
                "actor_tokens_per_s": (status.generated_tokens - tokens) / (now - at),
                **self._rollout.report(),
            }
            client.set_report(report)
            tokens, at = status.generated_tokens, now


def run_actor(config: Config, name: str, hub_address: str, run_directory: Path) -> None:
    """The actor's process. Returns when the hub says that the run is over."""
    uvloop.run(_main(config, name, hub_address, run_directory))


async def _main(config: Config, name: str, hub_address: str, run_directory: Path) -> None:
    checkpoint = Path(config.model.path)
    with closing(SpanRecorder(run_directory / "spans" / f"{name}.jsonl", name, "actor")) as recorder:
        engine = EmbeddedEngine(
            checkpoint,
            engine_id=f"{name}/embedded",
            slots=config.actor.max_running_requests,
            max_context=config.sampling.max_context_tokens,
            device=config.actor.device,
            threads=config.actor.threads,
            fixed_slots=config.run.deterministic,
            on_busy=lambda start_ns, end_ns: recorder.add("generate", start_ns, end_ns),
        )
        rollout = make_rollout(config, checkpoint, engine)
        async with LoopWatch():
            await Worker(config, name, engine, rollout, recorder).run(hub_address)
