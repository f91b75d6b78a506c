"""A hub in this process, and an actor, a learner and an observer played by hand over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Self

from slime_async.config import Config, ConfigError
from slime_async.protocol import (
    Batch,
    Commit,
    Deliver,
    Delivered,
    Ejected,
    EngineInfo,
    Failed,
    GetStatus,
    Granted,
    Hello,
    Lease,
    Membership,
    Message,
    Ok,
    Published,
    Reservation,
    Role,
    RunStatus,
    Shutdown,
    Started,
)
from slime_async.trajectory import VersionSpan, WeightId
from slime_async.transport.client import HubClient
from slime_async.transport.errors import ConnectionLost
from slime_async.transport.hub import Hub, Judge
from slime_async.transport.observer import HubObserver
from tests.transport.examples import make_trajectory

DEADLINE_S = 60.0
WAIT_S = 10.0
"""Of calls that will be answered"""
SOURCES = {"train": 100, "held-out": 3}


def run(test: Coroutine[Any, Any, None], deadline_s: float = DEADLINE_S) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(deadline_s):
            await test

    asyncio.run(bounded())


def make_config(
    *,
    eta: int = 1,
    stall_s: float = 60.0,
    heartbeat_timeout_s: float = 5.0,
    learner: dict[str, Any] | None = None,
    **batch: Any,
) -> Config:
    """Two groups of two per batch."""
    return Config.model_validate(
        {
            "model": {"path": "tests:unused"},
            "task": {
                "train": {"train": {"factory": "tests:unused"}},
                "evaluation": {"held-out": {"factory": "tests:unused"}},
                "shuffle": False,
            },
            "batch": {"groups": 2, "group_size": 2, **batch},
            "staleness": {"max_staleness": eta},
            "learner": learner or {},
            "checkpoint": {"interval_steps": 5 if learner else 0},
            "hub": {
                "heartbeat_interval_s": 0.05,
                "heartbeat_timeout_s": heartbeat_timeout_s,
                "stall_timeout_s": stall_s,
            },
        }
    )


class Player:
    """One connection; what the hub tells it lies in ``told``."""

    client: HubClient

    def __init__(self, name: str) -> None:
        self.name = name
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        self.held: list[Reservation] = []
        """What an actor says that it works on when it comes back"""

    async def handle(self, message: Message) -> Message | None:
        self.told.put_nowait(message)
        return None

    async def connect(self, address: str, role: Role, **hello: Any) -> Self:
        said = Hello(role, self.name, **hello)
        self.client = await HubClient.connect(
            address,
            said,
            handler=self.handle,
            reconnect_s=WAIT_S,
            refreshed_hello=lambda: replace(said, running=tuple(self.held)),
        )
        return self

    async def call(self, message: Message) -> Message:
        return await self.client.call(message, WAIT_S, retry=True)

    async def hears(self, kind: type[Message]) -> Message:
        """The next message of this kind; others before it are skipped."""
        while not isinstance(message := await self.told.get(), kind):
            pass
        return message

    async def status(self) -> RunStatus:
        """Also a barrier: what was sent before has been taken."""
        status = await self.call(GetStatus())
        assert isinstance(status, RunStatus)
        return status

    async def leaves(self) -> None:
        """As a role does when it is told that the run is over."""
        await self.hears(Shutdown)
        await self.client.close()

    async def vanish(self) -> None:
        """Die without a goodbye, as a killed process does."""
        self.client._end(ConnectionLost(f"{self.name} was killed"))


class Actor(Player):
    @property
    def engine(self) -> EngineInfo:
        return EngineInfo(f"{self.name}/engine", self.name, 1)

    async def join(self, address: str, slots: int, sources: dict[str, int] = SOURCES) -> Self:
        return await self.connect(address, "actor", slots=slots, engines=(self.engine,), sources=sources)

    async def handle(self, message: Message) -> Message | None:
        await super().handle(message)
        return None if isinstance(message, Granted | Shutdown | Ejected) else Ok()

    async def granted(self, count: int) -> list[Reservation]:
        """Exactly so many: fewer wait, more fail."""
        reservations: list[Reservation] = []
        while len(reservations) < count:
            message = await self.hears(Granted)
            assert isinstance(message, Granted)
            reservations.extend(message.reservations)
        await self.granted_nothing()
        assert len(reservations) == count
        return reservations

    async def granted_nothing(self) -> None:
        await self.status()
        assert self.told.empty(), self.told

    async def start(self, reservation: Reservation) -> None:
        await self.client.note(Started(reservation.key, reservation.attempt))

    async def deliver(self, reservation: Reservation, version: int = 0, **fields: Any) -> str:
        trajectory = make_trajectory(
            reservation.key.task,
            reservation.sample,
            task=reservation.task,
            attempt=reservation.attempt,
            spans=(VersionSpan(2, WeightId(1, version)),),
            **fields,
        )
        reply = await self.call(Deliver(trajectory, reservation.evaluation))
        assert isinstance(reply, Delivered)
        return reply.outcome

    async def deliver_all(self, reservations: list[Reservation], version: int = 0) -> None:
        for reservation in reservations:
            assert await self.deliver(reservation, version) == "accepted"

    async def fail(self, reservation: Reservation, reason: str, kind: str = "") -> None:
        failed = Failed(reservation.key, reservation.attempt, reason, reservation.evaluation, kind)
        assert await self.call(failed) == Ok()


class Learner(Player):
    incarnation = 1

    async def join(self, address: str, incarnation: int = 1, version: int = 0) -> Self:
        return await self.connect(address, "learner", incarnation=incarnation, version=version)

    async def publish(self, version: int) -> None:
        assert await self.call(Published(WeightId(self.incarnation, version))) == Ok()

    async def lease(self, version: int, wait_s: float = WAIT_S) -> Message:
        return await self.client.call(Lease(self.incarnation, version, wait_s), wait_s + WAIT_S, retry=True)

    async def leased(self, version: int, wait_s: float = WAIT_S) -> Batch:
        batch = await self.lease(version, wait_s)
        assert isinstance(batch, Batch), batch
        assert batch.train_version == version
        return batch

    async def commit(self, version: int) -> None:
        assert await self.call(Commit(self.incarnation, version)) == Ok()

    async def members(self, count: int) -> tuple[EngineInfo, ...]:
        """The engines, once there are so many."""
        while True:
            message = await self.hears(Membership)
            assert isinstance(message, Membership)
            if len(message.engines) == count:
                return message.engines


class Stage:
    """A running hub and everybody who joined it."""

    def __init__(self, hub: Hub, running: asyncio.Task[None], players: AsyncExitStack) -> None:
        self.hub = hub
        self.running = running
        self._players = players

    async def actor(self, name: str = "a", slots: int = 100, sources: dict[str, int] = SOURCES) -> Actor:
        return await self._keep(await Actor(name).join(self.hub.address, slots, sources))

    async def learner(self, name: str = "learner", incarnation: int = 1, version: int = 0) -> Learner:
        return await self._keep(await Learner(name).join(self.hub.address, incarnation, version))

    async def observer(self) -> Player:
        return await self._keep(await Player("observer").connect(self.hub.address, "observer"))

    async def _keep(self, player: Any) -> Any:
        self._players.push_async_callback(player.client.close)
        return player


@asynccontextmanager
async def stage(
    config: Config, judge: Judge | None = None, observer: HubObserver | None = None
) -> AsyncIterator[Stage]:
    hub = Hub(config, "run-1", judge=judge, observer=observer)
    await hub.start()
    running = asyncio.create_task(hub.run())
    try:
        async with AsyncExitStack() as players:
            yield Stage(hub, running, players)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, ConnectionLost, RuntimeError, ConfigError):
            await running
