"""An engine that generates nothing: it takes weights over a real group, and answers grants at once.

``weight_engine.py HUB NAME [HALT]`` runs one as a process of its own.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Self

import torch

from slime_async.protocol import (
    Deliver,
    Ejected,
    EngineInfo,
    EnginesChanged,
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
    WeightManifest,
)
from slime_async.trajectory import VersionSpan, WeightId
from slime_async.transport.client import HubClient
from slime_async.transport.errors import RemoteError
from slime_async.transport.shared_tensors import open_tensor
from slime_async.transport.weight_group import WeightGroup, WeightGroupError
from tests.transport.examples import make_trajectory

IN_FLIGHT = 3
"""What every engine says was being sampled when weights arrived"""


class WeightEngine:
    """One actor and its engine.

    It refuses the first ``refusals`` commands of the kind ``refused``, a broadcast before it takes part in it, as a
    server does that answers with an HTTP error. It halts for ever, and says so on stdout, at the point ``halt``: the
    name of a command, ``half``-way through a broadcast, or once it has ``taken`` one. An engine that is ejected comes
    back under a new id, healed.
    """

    client: HubClient

    def __init__(
        self,
        name: str,
        *,
        refusals: int = 0,
        refused: str = "ReceiveWeights",
        halt: str = "",
        ranks: int = 1,
        takes_buffers: bool = False,
    ) -> None:
        self._ranks, self._takes_buffers = ranks, takes_buffers
        self.name = name
        self.engine_id = f"{name}/engine"
        self._refusals, self._refused, self._halt = refusals, refused, halt
        self.weights: WeightId | None = None
        self.tensors: dict[str, torch.Tensor] = {}
        self.buffer_bytes = 0
        self.heard: list[str] = []
        self.changed = asyncio.Event()
        self._group: WeightGroup | None = None
        self._deliveries: set[asyncio.Task[Any]] = set()

    async def join(self, address: str) -> Self:
        hello = Hello("actor", self.name, slots=8, engines=(self._info,), sources={"train": 100})
        self.client = await HubClient.connect(address, hello, handler=self.handle)
        return self

    @property
    def _info(self) -> EngineInfo:
        return EngineInfo(self.engine_id, self.name, self._ranks, self._takes_buffers)

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
            await self._maybe_halt(type(message).__name__)
        if self._refusals and type(message).__name__ == self._refused:
            self._refusals -= 1
            raise ValueError("lm_head has another shape here")
        match message:
            case Ejected():
                self.engine_id, self._halt = f"{self.name}/engine.1", ""
                await self.client.note(EnginesChanged((self._info,)))
                return None
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
        if self._halt == "half":
            assert self._group is not None
            await asyncio.to_thread(self._group.receive, WeightManifest(message.manifest.tensors[:1]))
        await self._maybe_halt("half")
        if message.shared:
            pairs = zip(message.manifest.tensors, message.shared, strict=True)
            self.tensors = {spec.name: open_tensor(spec, shared).clone() for spec, shared in pairs}
        else:
            assert self._group is not None
            self.buffer_bytes = message.buffer_bytes
            self.tensors = await asyncio.to_thread(
                self._group.receive, message.manifest, buffer_bytes=message.buffer_bytes
            )
        await self._maybe_halt("taken")
        self.weights = message.weights
        self.changed.set()
        return Received(IN_FLIGHT)

    async def _maybe_halt(self, point: str) -> None:
        if point == self._halt:
            print(f"halted at {point}", flush=True)
            await asyncio.Event().wait()

    async def _deliver(self, reservation: Reservation) -> None:
        await self.holds(0)
        assert self.weights is not None
        trajectory = make_trajectory(
            sample=reservation.sample, task=reservation.task, spans=(VersionSpan(2, self.weights),)
        )
        await self.client.call(Deliver(trajectory), 10.0)


async def main(address: str, name: str, halt: str) -> None:
    engine = await WeightEngine(name, halt=halt).join(address)
    await engine.client.wait_closed()


PHASES = [PauseEngine.__name__, ReceiveWeights.__name__, ResumeEngine.__name__]

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else ""))
