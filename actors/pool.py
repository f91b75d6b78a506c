"""The engine pool of one actor: routes requests, notices engines that die or hang, and brings others up in their place.

::

    rollouts ── generate ──► route ──► engine a     serving
                               └─────► engine b.1   starting ► waiting for weights ► serving
    health, every ``health_interval_s`` ──► a dead or hung engine ► closed ► restarted under a new name

who                waits for                                         unblocked by
=================  ================================================  =================================
a request          an engine that has weights                        ``receive_weights``
a keeper           its engine to fail (one keeper per engine)        a failed health check, or an error
a restarted one    the learner, which forms the group anew           ``on_change``, told to the hub

An engine that died ends its requests as *aborted*, with the tokens that it had handed over: their owners submit what
is missing again, as after any abort, and the pool sends it elsewhere. No engine's death is silent: the pool gives up,
and ``run`` raises, when more engines died than ``max_restarts``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from slime_async.actors.engine import Engine, EngineError, EngineStatus, GenerateRequest, Generation
from slime_async.protocol import EngineInfo

log = logging.getLogger(__name__)
Result = TypeVar("Result")

MakeEngine = Callable[[str], Engine]
"""(engine id) → an engine that is not started"""

SESSIONS_REMEMBERED = 65_536
"""More episodes than one actor plays at once; forgetting one costs a prefix that is computed again"""


@dataclass(eq=False)
class Member:
    """One place in the pool, and the engine that has it now."""

    name: str
    make: MakeEngine
    engine: Engine
    lives: int = 0
    running: bool = False
    """Started, and not known to be dead"""
    has_weights: bool = False
    outstanding: int = 0
    """Requests that it works on"""
    generated_tokens: int = 0
    """Of the engine that is here now, when it was last asked"""
    broken: asyncio.Event = field(default_factory=asyncio.Event)
    problem: str = ""

    def fail(self, problem: str) -> None:
        """The first reason stays."""
        self.problem = self.problem or problem
        self.running = self.has_weights = False
        self.broken.set()


class EnginePool:
    """Engines of one actor. Start it, then keep ``run`` running; use it from one event loop."""

    def __init__(
        self,
        actor: str,
        makers: Sequence[MakeEngine],
        *,
        startup_timeout_s: float = 600.0,
        health_interval_s: float = 5.0,
        max_restarts: int = 8,
    ) -> None:
        """One engine per maker; they are called ``ACTOR/0``, ``ACTOR/1`` …, and ``ACTOR/0.1`` in their second life."""
        if not makers:
            raise ValueError(f"actor {actor} has no engines: a pool needs at least one")
        self._actor = actor
        self._startup_timeout_s = startup_timeout_s
        self._health_interval_s = health_interval_s
        self._max_restarts = max_restarts
        self._members = [Member(f"{actor}/{i}", make, make(f"{actor}/{i}")) for i, make in enumerate(makers)]
        self._sessions: OrderedDict[str, Member] = OrderedDict()
        self._unrouted: set[str] = set()
        """Requests for which no engine serves yet"""
        self._routed: dict[str, Engine] = {}
        """Who works on which request"""
        self._changed = asyncio.Condition()
        self._generated_before = 0
        self._started = False
        self.on_change: Callable[[tuple[EngineInfo, ...]], None] = lambda engines: None
        """Called with the engines that run whenever one dies or comes up, once the pool is started"""
        self.deaths = 0
        """Engines that died or hung since the start"""

    # --------------------------------------------------------------------------------------------------- life cycle

    async def start(self) -> None:
        """Bring all engines up. Raises ``EngineError`` when one cannot: later ones are given more chances."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for member in self._members:
                    tasks.create_task(self._start(member), name=f"start {member.engine.engine_id}")
        except* EngineError as group:
            await self.close()
            raise EngineError(str(group.exceptions[0])) from group
        self._started = True

    async def run(self) -> None:
        """Keep the engines alive; returns only by cancellation. Raises ``EngineError`` when restarts are used up."""
        async with asyncio.TaskGroup() as tasks:
            for member in self._members:
                tasks.create_task(self._keep(member), name=f"keeper of {member.name}")

    async def close(self) -> None:
        await asyncio.gather(*(member.engine.close() for member in self._members))

    @property
    def infos(self) -> tuple[EngineInfo, ...]:
        """The engines that run, as the learner needs to know them."""
        engines = (member.engine for member in self._members if member.running)
        return tuple(EngineInfo(e.engine_id, self._actor, e.num_ranks, e.takes_buffers) for e in engines)

    async def _start(self, member: Member) -> None:
        engine = member.engine
        try:
            async with asyncio.timeout(self._startup_timeout_s):
                await engine.start()
                weights = (await engine.status()).weights
        except TimeoutError as error:
            raise EngineError(
                f"engine {engine.engine_id} did not start within actor.startup_timeout_s = "
                f"{self._startup_timeout_s:g} s"
            ) from error
        member.running, member.has_weights = True, weights is not None
        await self._tell()

    async def _keep(self, member: Member) -> None:
        """Wait for the engine's end, then put another in its place; for ever."""
        while True:
            if member.running:
                await self._watch(member)
            await self._replace(member)

    async def _watch(self, member: Member) -> None:
        """Until the engine is known to be broken, by its own health check or by somebody's failed call."""
        while not member.broken.is_set():
            try:
                async with asyncio.timeout(self._health_interval_s):
                    await member.broken.wait()
            except TimeoutError:
                try:
                    await member.engine.check_health()
                except EngineError as error:
                    member.fail(str(error))

    async def _replace(self, member: Member) -> None:
        self.deaths += 1
        log.warning("engine %s is given up: %s", member.engine.engine_id, member.problem)
        await self._tell()
        if self.deaths > self._max_restarts:
            raise EngineError(
                f"engine {member.engine.engine_id} is broken, and all {self._max_restarts} restarts of "
                f"actor.max_restarts are used up: {member.problem}"
            )
        await member.engine.close()
        self._generated_before += member.generated_tokens
        member.generated_tokens = 0
        member.lives += 1
        engine_id = f"{member.name}.{member.lives}"
        member.engine, member.broken, member.problem = member.make(engine_id), asyncio.Event(), ""
        try:
            await self._start(member)
            log.info("engine %s runs in place of the one before; it waits for weights", engine_id)
        except EngineError as error:
            member.fail(str(error))

    async def _tell(self) -> None:
        if self._started:
            self.on_change(self.infos)
        async with self._changed:
            self._changed.notify_all()

    # ----------------------------------------------------------------------------------------------------- requests

    async def generate(self, request: GenerateRequest) -> Generation:
        """As ``Engine.generate``; an engine that dies meanwhile gives an aborted answer with what it handed over."""
        member = await self._route(request)
        if member is None:
            return Generation([], [], (), "abort")
        engine = member.engine
        member.outstanding += 1
        self._routed[request.request_id] = engine
        try:
            return await engine.generate(request)
        except EngineError as error:
            if not await self._died(member, engine):
                raise
            return error.partial or Generation([], [], (), "abort")
        finally:
            member.outstanding -= 1
            del self._routed[request.request_id]

    async def abort(self, request_id: str) -> None:
        """As ``Engine.abort``, also of a request for which no engine serves yet."""
        if request_id in self._unrouted:
            self._unrouted.remove(request_id)
            async with self._changed:
                self._changed.notify_all()
        elif engine := self._routed.get(request_id):
            try:
                await engine.abort(request_id)
            except EngineError as error:  # one that died has ended the request already; its keeper sees to it
                log.warning("request %s could not be taken back: %s", request_id, error)

    async def _route(self, request: GenerateRequest) -> Member | None:
        """The engine that holds this session's prefix, if it still serves; else the least loaded. None once aborted."""
        request_id, session = request.request_id, request.session
        self._unrouted.add(request_id)
        try:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: request_id not in self._unrouted or any(member.has_weights for member in self._members)
                )
            if request_id not in self._unrouted:
                return None
        finally:
            self._unrouted.discard(request_id)
        member = self._sessions.get(session) if session is not None else None
        if member is None or not member.has_weights:
            serving = (member for member in self._members if member.has_weights)
            member = min(serving, key=lambda member: member.outstanding / member.engine.num_ranks)
        if session is not None:
            self._sessions[session] = member
            self._sessions.move_to_end(session)
            if len(self._sessions) > SESSIONS_REMEMBERED:
                self._sessions.popitem(last=False)
        return member

    async def _died(self, member: Member, engine: Engine) -> bool:
        """Whether an error was the engine's end, which its keeper is told; an engine that lives refused something."""
        if member.engine is not engine or not member.running:
            return True
        try:
            await engine.check_health()
        except EngineError as error:
            member.fail(str(error))
            return True
        return False

    # ------------------------------------------------------------------------------------------------------ weights

    def member(self, engine_id: str) -> Member:
        """Raises ``ValueError`` for an engine that is not here, or is here no longer."""
        for member in self._members:
            if member.engine.engine_id == engine_id:
                return member
        held = ", ".join(member.engine.engine_id for member in self._members)
        raise ValueError(f"actor {self._actor} holds {held}, not {engine_id}")

    def restart(self, engine_id: str, reason: str) -> None:
        """Give up an engine; another comes up in its place, as it has already where this one is here no longer."""
        for member in self._members:
            if member.engine.engine_id == engine_id:
                member.fail(reason)

    async def command(self, engine_id: str, work: Callable[[Engine], Awaitable[Result]], timeout_s: float) -> Result:
        """Do ``work`` on an engine. One that is late is given up: it may be in a collective that nobody ends.

        Raises ``ValueError`` for an engine that is not here, ``TimeoutError``, and what the engine raises.
        """
        member = self.member(engine_id)
        engine = member.engine
        try:
            async with asyncio.timeout(timeout_s):
                return await work(engine)
        except TimeoutError as error:
            member.fail(f"it was late with a command of the learner's: no answer within {timeout_s:g} s")
            raise TimeoutError(f"engine {engine_id} is given up: no answer within {timeout_s:g} s") from error
        except EngineError:
            await self._died(member, engine)
            raise
        finally:
            await self._look_at_weights(member, engine)

    async def _look_at_weights(self, member: Member, engine: Engine) -> None:
        """A command may have brought weights, or spoilt them."""
        if member.engine is engine and member.running:
            status = await engine.status()
            if member.has_weights != (status.weights is not None):
                member.has_weights = not member.has_weights
                async with self._changed:
                    self._changed.notify_all()

    async def status(self) -> EngineStatus:
        """Sums over the engines that run; the weights are the oldest that any of them holds."""
        statuses = []
        for member in self._members:
            if member.running:
                try:
                    statuses.append(await member.engine.status())
                except EngineError as error:
                    member.fail(str(error))
                else:
                    member.generated_tokens = statuses[-1].generated_tokens
        held = [status.weights for status in statuses if status.weights is not None]
        return EngineStatus(
            self._actor,
            min(held) if held else None,
            any(status.paused for status in statuses),
            sum(status.running_requests for status in statuses),
            sum(status.waiting_requests for status in statuses),
            self._generated_before + sum(member.generated_tokens for member in self._members),
        )
