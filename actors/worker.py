"""The actor's process: takes grants, plays episodes, delivers trajectories, and obeys the learner's weight commands.

::

    hub ── Granted ──► rollout tasks (at most ``slots``) ── generate ──► engine pool ──► engines (threads or servers)
        ◄─ Deliver ──      one coroutine per reservation
        ── JoinWeightGroup, Pause, Receive, Resume ────────────────────────────────────► one of its engines
        ◄─ EnginesChanged ── an engine died, or came up again ──────────── engine pool

Consumes grants; waits for the engine, the environment and the hub's acknowledgement; unblocked by weights (an engine
without weights samples nothing) and by admission; produces trajectories. The role ends when the hub says so, or with
the first background task that fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import uvloop

from slime_async.actors.engine import Engine, PauseMode
from slime_async.actors.engines import make_pool
from slime_async.actors.pool import EnginePool
from slime_async.actors.rollout import Rollout, RolloutFailure, make_rollout
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
from slime_async.trajectory import Trajectory
from slime_async.transport.client import HubClient
from slime_async.transport.errors import BadMessage, RemoteError

log = logging.getLogger(__name__)

DELIVERY_TIMEOUT_S = 120.0
"""A trajectory that the hub has not acknowledged by then fails the actor: the hub grants it to another."""


class RunOver(Exception):
    """The hub said that the run is over."""


class RunEnded(RuntimeError):
    """The hub said that the run has failed, and why."""


class Worker:
    """One actor: one engine pool, one connection, and a coroutine per reservation."""

    def __init__(self, config: Config, name: str, pool: EnginePool, rollout: Rollout) -> None:
        self._config = config
        self._name = name
        self._pool = pool
        self._rollout = rollout
        self._shutdown: asyncio.Future[Shutdown] = asyncio.get_running_loop().create_future()
        self._client: HubClient | None = None
        self._granted: asyncio.Queue[Reservation] = asyncio.Queue()

    async def run(self, hub_address: str) -> None:
        """Until the hub says that the run is over. Raises what broke: the connection, the engines, or a bug of ours."""
        try:
            await self._pool.start()
            await self._serve(hub_address)
        finally:
            await self._pool.close()

    async def _serve(self, hub_address: str) -> None:
        hello = Hello(
            role="actor",
            name=self._name,
            slots=self._config.actor.slots,
            engines=self._pool.infos,
            sources=self._rollout.source_sizes,
        )
        self._client = await HubClient.connect(hub_address, hello, handler=self._handle)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._client.wait_closed(), name="hub connection")
                tasks.create_task(self._pool.run(), name="engine pool")
                tasks.create_task(self._tell_of_engines(self._client, hello.engines), name="engines")
                tasks.create_task(self._report_regularly(self._client), name="report")
                tasks.create_task(self._end_when_told(), name="shutdown")
                tasks.create_task(self._play_what_is_granted(tasks), name="grants")
        except* RunOver:
            log.info("the run is over")
        finally:
            await self._client.close()

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
                timeout_s = self._config.weights.command_timeout_s
                return await self._pool.command(message.engine_id, partial(_obey, message), timeout_s)
            case _:
                raise ValueError(f"{type(message).__name__} is nothing that an actor does")

    async def _tell_of_engines(self, client: HubClient, told: tuple[EngineInfo, ...]) -> None:
        """Consumes the pool's changes; the hub then tells the learner, which brings weights to those who lack them."""
        changed = asyncio.Event()
        self._pool.on_change = lambda _: changed.set()
        while True:
            if (engines := self._pool.infos) != told:
                await client.note(EnginesChanged(engines))
                told = engines
            await changed.wait()
            changed.clear()

    # --------------------------------------------------------------------------------------------------- rollouts

    async def _play_what_is_granted(self, tasks: asyncio.TaskGroup) -> None:
        """Consumes grants, which may come before the hub's welcome; starts nothing once the role is ending."""
        while True:
            reservation = await self._granted.get()
            tasks.create_task(self._play(reservation), name=f"rollout {reservation.key}")

    async def _play(self, reservation: Reservation) -> None:
        """One reservation, to its delivery or its failure; both are told to the hub, and the hub grants anew."""
        assert self._client is not None
        await self._client.note(Started(reservation.key, reservation.attempt))
        outcome = await self._rollout.run(reservation)
        reason = outcome.reason if isinstance(outcome, RolloutFailure) else await self._deliver(outcome, reservation)
        if reason:
            failed = Failed(reservation.key, reservation.attempt, reason, reservation.evaluation)
            await self._client.call(failed, DELIVERY_TIMEOUT_S)

    async def _deliver(self, trajectory: Trajectory, reservation: Reservation) -> str:
        """Why the hub does not take it (too large, most likely); empty when it does."""
        assert self._client is not None
        if self._config.actor.delay_s and not reservation.evaluation:
            await asyncio.sleep(self._config.actor.delay_s)
        try:
            await self._client.call(Deliver(trajectory, reservation.evaluation), DELIVERY_TIMEOUT_S)
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


async def _obey(command: EngineCommand, engine: Engine) -> Message:
    """One of the learner's commands, done."""
    match command:
        case PrepareWeights():
            await engine.check_health()
            await engine.check_weights(command.manifest)
        case JoinWeightGroup():
            await engine.join_weight_group(command.spec, command.rank_offset)
        case PauseEngine():
            await engine.pause(PauseMode(command.mode))
        case ReceiveWeights():
            await engine.receive_weights(command.manifest, command.weights, command.shared)
            return Received(engine.in_flight_at_update)
        case ResumeEngine():
            await engine.resume()
    return Ok()


def run_actor(config: Config, name: str, hub_address: str, run_directory: Path) -> None:
    """The actor's process. Returns when the hub says that the run is over."""
    uvloop.run(_main(config, name, hub_address, run_directory))


async def _main(config: Config, name: str, hub_address: str, run_directory: Path) -> None:
    checkpoint = Path(config.model.path)
    with closing(SpanRecorder(run_directory / "spans" / f"{name}.jsonl", name)) as recorder:
        pool = make_pool(config, name, run_directory / "logs", recorder)
        rollout = make_rollout(config, checkpoint, pool)
        await Worker(config, name, pool, rollout).run(hub_address)
