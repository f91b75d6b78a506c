"""What takes weights from the learner's memory into the engines': a process group between devices, or shared memory."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch

from slime_async.config.schema import WeightsConfig
from slime_async.learner.commands import Call, EngineCommands
from slime_async.learner.group_source import GroupSource
from slime_async.learner.snapshots import Snapshot
from slime_async.learner.source_ranks import OtherSource, SourceLost
from slime_async.learner.sources import lanes, sources_of_lane
from slime_async.protocol import (
    EngineInfo,
    JoinWeightGroup,
    Message,
    ReceiveWeights,
    WeightGroupSpec,
    WeightManifest,
)
from slime_async.transport.shared_tensors import Shares
from slime_async.transport.weight_group import WeightGroupError

log = logging.getLogger(__name__)

Backend = Literal["gloo", "nccl", "ipc"]


class Carrier(Protocol):
    """Belongs to the publisher's thread. Whatever it raises makes the publisher close it and try again."""

    def connect(self, engines: tuple[EngineInfo, ...]) -> None:
        """Be able to reach exactly these engines."""

    def manifest(self, snapshot: Snapshot) -> WeightManifest:
        """All that engines get, in the snapshot and beside it."""

    def wait_queued(self, snapshot: Snapshot) -> None:
        """Until all that is sent is converted, on CUDA at least queued."""

    def send(self, snapshot: Snapshot, engines: tuple[EngineInfo, ...]) -> list[Message]:
        """Carry the snapshot over; returns the engines' ``Received`` once all of them use it."""

    def close(self) -> None:
        """Leave; ``connect`` begins anew."""


class GroupCarrier:
    """Broadcasts over process groups of a source rank and engines: ``sources`` says who is in which.

    One broadcast per buffer; where an engine takes none, one per tensor for all.
    """

    def __init__(
        self,
        commands: EngineCommands,
        config: WeightsConfig,
        backend: Literal["gloo", "nccl"],
        address: str,
        others: Sequence[OtherSource] = (),
    ) -> None:
        self._commands = commands
        self._config = config
        self._name = f"weights-{secrets.token_hex(4)}"  # servers outlive learners, and know groups by name
        self._sources = 1 + len(others)
        self._source = GroupSource(0, self._sources, backend, config.timeout_s, address)
        self._others = others
        self._members: tuple[EngineInfo, ...] = ()
        self._epoch = 0

    def connect(self, engines: tuple[EngineInfo, ...]) -> None:
        """The groups of the sources and exactly these engines; formed anew when the members differ."""
        if self._members == engines:
            return
        self.close()
        self._epoch += 1
        dealt = lanes(engines, self._sources)
        worlds = [1 + sum(engine.num_ranks for engine in lane) for lane in dealt]
        hosting = [other.host(self._name, self._epoch, worlds) for other in self._others]
        specs = [self._source.host(self._name, self._epoch, worlds)]
        specs += [[WeightGroupSpec(**spec) for spec in answer["specs"]] for answer in self._answers(hosting)]
        joining = []
        for number, lane in enumerate(dealt):
            first, *rest = (specs[source][number] for source in sources_of_lane(number, self._sources))
            offset = 1
            for engine in lane:
                joining.append(
                    self._commands.begin(engine, JoinWeightGroup(engine.engine_id, first, offset, tuple(rest)))
                )
                offset += engine.num_ranks
        forming = [other.join() for other in self._others]
        with self._explained_by(joining):
            self._source.join()
            self._answers(forming)
        self._commands.finish(joining)
        self._members = engines
        names = [engine.engine_id for engine in engines]
        log.info("weight groups %s-…-%d: %d sources, engines %s", self._name, self._epoch, self._sources, names)

    def manifest(self, snapshot: Snapshot) -> WeightManifest:
        return WeightManifest(tuple(tensor for part in self._parts(snapshot) for tensor in part.tensors))

    def wait_queued(self, snapshot: Snapshot) -> None:
        waiting = [other.queued(snapshot.weights) for other in self._others]
        snapshot.wait_queued(self._config.timeout_s)
        self._answers(waiting)

    def send(self, snapshot: Snapshot, engines: tuple[EngineInfo, ...]) -> list[Message]:
        whole = all(engine.takes_buffers for engine in engines)
        receiving = self._begin_receiving(snapshot, engines, whole_buffers=whole)
        sending = [other.send(snapshot.weights, whole_buffers=whole) for other in self._others]
        with self._explained_by(receiving):
            unless: list[Future[Any]] = [*(call for _, call in receiving), *sending]
            self._source.send(snapshot, unless, whole_buffers=whole)
            self._follow(sending, receiving)
        return self._commands.finish(receiving)

    def close(self) -> None:
        """Whoever still sends or waits is told so by the groups' end."""
        self._members = ()
        leaving = [other.leave() for other in self._others]
        self._source.leave()
        try:
            self._answers(leaving)
        except (SourceLost, WeightGroupError) as error:
            # at a run's end as it should be; else the next order fails, too
            log.info("a source did not leave its weight groups: %s", error)

    def _parts(self, snapshot: Snapshot) -> list[WeightManifest]:
        return [snapshot.manifest, *(other.part for other in self._others)]

    def _begin_receiving(
        self, snapshot: Snapshot, engines: tuple[EngineInfo, ...], *, whole_buffers: bool
    ) -> list[Call]:
        parts = self._parts(snapshot)
        receiving: list[Call] = []
        for number, lane in enumerate(lanes(engines, self._sources)):
            order = [parts[source].tensors for source in sources_of_lane(number, self._sources)]
            manifest = WeightManifest(tuple(tensor for part in order for tensor in part))
            shares = tuple(map(len, order)) if self._others else ()
            for engine in lane:
                command = ReceiveWeights(
                    engine.engine_id,
                    manifest,
                    snapshot.weights,
                    shares=shares,
                    buffer_bytes=self._config.buffer_bytes if whole_buffers else 0,
                )
                receiving.append(self._commands.begin(engine, command))
        return receiving

    def _follow(self, sending: Sequence[Future[dict[str, Any]]], receiving: Sequence[Call]) -> None:
        """Until the other sources have sent their parts. Raises as soon as one of them or an engine failed."""
        calls = [call for _, call in receiving]
        everything: list[Future[Any]] = [*sending, *calls]
        wait(everything, self._config.command_timeout_s, FIRST_EXCEPTION)
        if failed := [call for call in calls if call.done() and call.exception() is not None]:
            raise WeightGroupError(f"given up, as an engine says: {failed[0].exception()}")
        self._answers(sending)

    def _answers(self, asked: Sequence[Future[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Of all other sources, each of which has a deadline of its own that comes first."""
        wait_s = self._config.command_timeout_s
        return [other.answer(call, wait_s) for other, call in zip(self._others, asked, strict=True)]

    @contextmanager
    def _explained_by(self, calls: Sequence[Call]) -> Iterator[None]:
        """A collective that fails here says only that somebody is missing; the engines' answers say why."""
        try:
            yield
        except SourceLost:
            self.close()
            raise
        except WeightGroupError as error:
            self.close()  # engines may be waiting for sources that have nothing to do with what failed
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

    def manifest(self, snapshot: Snapshot) -> WeightManifest:
        return snapshot.manifest

    def wait_queued(self, snapshot: Snapshot) -> None:
        snapshot.wait_queued(self._config.timeout_s)

    def send(self, snapshot: Snapshot, engines: tuple[EngineInfo, ...]) -> list[Message]:
        snapshot.wait_filled(self._config.timeout_s)

        def command(engine: EngineInfo) -> ReceiveWeights:
            shared = tuple(map(self._shares.share, snapshot.tensors))
            return ReceiveWeights(engine.engine_id, snapshot.manifest, snapshot.weights, shared)

        return self._commands.finish(self._commands.begin_all(engines, command))

    def close(self) -> None:
        """There is nothing to leave."""


def weight_backend(config: WeightsConfig, device: torch.device) -> Backend:
    """As configured; ``auto`` follows the device of the learner's weights."""
    if config.backend != "auto":
        return config.backend
    return "nccl" if device.type == "cuda" else "gloo"


def make_carrier(
    commands: EngineCommands, config: WeightsConfig, backend: Backend, address: str, others: Sequence[OtherSource]
) -> Carrier:
    if backend == "ipc":
        return MemoryCarrier(commands, config)
    return GroupCarrier(commands, config, backend, address, others)
