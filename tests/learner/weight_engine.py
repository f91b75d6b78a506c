"""An engine that generates nothing: it takes weights over a real group, and answers grants at once.

``weight_engine.py HUB NAME`` runs one as a process of its own.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Self

import torch

from slime_async.protocol import (
    Deliver,
    EngineInfo,
    Granted,
    Hello,
    JoinWeightGroup,
    Message,
    Ok,
    PauseEngine,
    Received,
    ReceiveWeights,
    Reservation,
    ResumeEngine,
    Shutdown,
)
from slime_async.trajectory import VersionSpan, WeightId
from slime_async.transport.client import HubClient
from slime_async.transport.errors import RemoteError
from slime_async.transport.weight_group import WeightGroup, WeightGroupError
from tests.transport.examples import make_trajectory

IN_FLIGHT = 3
"""What every engine says was being sampled when weights arrived"""


class WeightEngine:
    """One actor and its engine. ``refuse`` makes it refuse every broadcast, as for tensors of a wrong shape."""

    client: HubClient

    def __init__(self, name: str, *, refuse: bool = False) -> None:
        self.name = name
        self.refuse = refuse
        self.weights: WeightId | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.heard: list[str] = []
        self.changed = asyncio.Event()
        self._group: WeightGroup | None = None
        self._deliveries: set[asyncio.Task[Any]] = set()

    async def join(self, address: str) -> Self:
        engine = EngineInfo(f"{self.name}/engine", self.name, 1)
        hello = Hello("actor", self.name, slots=8, engines=(engine,), sources={"train": 100})
        self.client = await HubClient.connect(address, hello, handler=self.handle)
        return self

    async def holds(self, version: int) -> None:
        while self.weights is None or self.weights.version < version:
            self.changed.clear()
            await self.changed.wait()

    async def close(self) -> None:
        await self.client.close()
        if self._group is not None:
            await asyncio.to_thread(self._group.close)

    async def handle(self, message: Message) -> Message | None:
        if not isinstance(message, Granted | Shutdown):
            self.heard.append(type(message).__name__)
        match message:
            case Shutdown():
                return None
            case Granted():
                for reservation in message.reservations:
                    self._deliveries.add(asyncio.create_task(self._deliver(reservation)))
                return None
        try:
            return await self._command(message)
        except WeightGroupError as failed:
            raise RemoteError(type(failed).__name__, str(failed)) from failed

    async def _command(self, message: Message) -> Message:
        match message:
            case JoinWeightGroup():
                if self._group is not None:
                    await asyncio.to_thread(self._group.close)
                self._group = await asyncio.to_thread(WeightGroup.create, message.spec, message.rank_offset)
            case ReceiveWeights():
                return await self._receive(message)
        return Ok()

    async def _receive(self, message: ReceiveWeights) -> Received:
        assert self._group is not None
        if self.refuse:
            raise ValueError("lm_head has another shape here")
        self.tensors = await asyncio.to_thread(self._group.receive, message.manifest)
        self.weights = message.weights
        self.changed.set()
        return Received(IN_FLIGHT)

    async def _deliver(self, reservation: Reservation) -> None:
        assert self.weights is not None
        trajectory = make_trajectory(
            sample=reservation.sample, task=reservation.task, spans=(VersionSpan(2, self.weights),)
        )
        await self.client.call(Deliver(trajectory), 10.0)


async def main(address: str, name: str) -> None:
    engine = await WeightEngine(name).join(address)
    await engine.client.wait_closed()


PHASES = [PauseEngine.__name__, ReceiveWeights.__name__, ResumeEngine.__name__]

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
