"""What takes weights from the learner's memory into the engines': a process group between devices, or shared memory."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from slime_async.config.schema import WeightsConfig
from slime_async.learner.commands import Call, EngineCommands
from slime_async.learner.snapshots import Snapshot
from slime_async.protocol import EngineInfo, JoinWeightGroup, Message, ReceiveWeights
from slime_async.transport.shared_tensors import Shares
from slime_async.transport.weight_group import WeightGroup, WeightGroupError, host_group

log = logging.getLogger(__name__)

Backend = Literal["gloo", "nccl", "ipc"]


class Carrier(Protocol):
    """Belongs to the publisher's thread. Whatever it raises makes the publisher close it and try again."""

    def connect(self, engines: tuple[EngineInfo, ...]) -> None:
        """Be able to reach exactly these engines."""

    def send(self, snapshot: Snapshot, engines: tuple[EngineInfo, ...]) -> list[Message]:
        """Carry the snapshot over; returns the engines' ``Received`` once all of them use it."""

    def close(self) -> None:
        """Leave; ``connect`` begins anew."""


class GroupCarrier:
    """One broadcast per tensor over a process group of the learner and all engine ranks."""

    def __init__(
        self, commands: EngineCommands, config: WeightsConfig, backend: Literal["gloo", "nccl"], address: str
    ) -> None:
        self._commands = commands
        self._config = config
        self._backend: Literal["gloo", "nccl"] = backend
        self._address = address
        self._name = f"weights-{secrets.token_hex(4)}"  # servers outlive learners, and know groups by name
        self._group: WeightGroup | None = None
        self._members: tuple[EngineInfo, ...] = ()
        self._epoch = 0

    def connect(self, engines: tuple[EngineInfo, ...]) -> None:
        """The group of the learner and exactly these engines; formed anew when the members differ."""
        if self._group is not None and self._members == engines:
            return
        self.close()
        self._epoch += 1
        world_size = 1 + sum(engine.num_ranks for engine in engines)
        spec, store = host_group(
            self._name, self._epoch, world_size, self._backend, self._config.timeout_s, self._address
        )
        offset, joining = 1, []
        for engine in engines:
            joining.append(self._commands.begin(engine, JoinWeightGroup(engine.engine_id, spec, offset)))
            offset += engine.num_ranks
        with self._explained_by(joining):
            self._group = WeightGroup.create(spec, 0)
        del store  # everybody has joined: the group holds the store by itself now
        self._members = engines
        self._commands.finish(joining)
        log.info("weight group %s: %d ranks, engines %s", spec.name, world_size, [e.engine_id for e in engines])

    def send(self, snapshot: Snapshot, engines: tuple[EngineInfo, ...]) -> list[Message]:
        assert self._group is not None
        receiving = self._commands.begin_all(
            engines, lambda e: ReceiveWeights(e.engine_id, snapshot.manifest, snapshot.weights)
        )
        with self._explained_by(receiving):
            self._group.send(snapshot.arriving(self._config.timeout_s), unless=[call for _, call in receiving])
        return self._commands.finish(receiving)

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    @contextmanager
    def _explained_by(self, calls: Sequence[Call]) -> Iterator[None]:
        """A collective that fails here says only that somebody is missing; the engines' answers say why."""
        try:
            yield
        except WeightGroupError as error:
            answers = "; ".join(map(str, self._commands.errors(calls))) or "nothing"
            raise WeightGroupError(f"{error}; the engines say: {answers}") from error


class MemoryCarrier:
    """Handles to the snapshot's own buffers, which engines on the same device copy from."""

    def __init__(self, commands: EngineCommands, config: WeightsConfig) -> None:
        self._commands = commands
        self._config = config
        self._shares = Shares()

    def connect(self, engines: tuple[EngineInfo, ...]) -> None:
        """Raises ``ValueError`` for engines that are spread over devices: one of them is the learner's at most."""
        for engine in engines:
            if engine.num_ranks != 1:
                raise ValueError(
                    f"weights.backend = 'ipc' reaches engines on the learner's own device, but {engine.engine_id} has "
                    f"{engine.num_ranks} ranks: use nccl, with devices of their own"
                )

    def send(self, snapshot: Snapshot, engines: tuple[EngineInfo, ...]) -> list[Message]:
        snapshot.wait_filled(self._config.timeout_s)

        def command(engine: EngineInfo) -> ReceiveWeights:
            shared = tuple(map(self._shares.share, snapshot.tensors))
            return ReceiveWeights(engine.engine_id, snapshot.manifest, snapshot.weights, shared)

        return self._commands.finish(self._commands.begin_all(engines, command))

    def close(self) -> None:
        """There is nothing to leave."""


def make_carrier(commands: EngineCommands, config: WeightsConfig, backend: Backend, address: str) -> Carrier:
    if backend == "ipc":
        return MemoryCarrier(commands, config)
    return GroupCarrier(commands, config, backend, address)
