"""A real hub and a learner with a publisher, for tests; engines are actors in this process or in one of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from weight_engine import WeightEngine

from slime_async.config import Config
from slime_async.config.schema import WeightsConfig
from slime_async.learner.carriers import Backend
from slime_async.learner.publisher import Publisher, Snapshot
from slime_async.learner.snapshots import WeightBuffers
from slime_async.protocol import Batch, Commit, Hello, Lease, Membership, Message, Ok, TensorSpec, WeightManifest
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.hub import Hub, LearnerLost
from tests.hub.players import make_config

DEADLINE_S = 40.0
MANIFEST = WeightManifest((TensorSpec("embed", "float32", (4, 3)), TensorSpec("norm", "bfloat16", (3,))))
Result = TypeVar("Result")


def snapshot(version: int) -> Snapshot:
    """Tensors that say which version they are."""
    held = WeightBuffers.allocate(MANIFEST, torch.device("cpu"), WeightsConfig().buffer_bytes)
    for tensor, value in zip(held.tensors, (version, version + 0.5), strict=True):
        tensor.fill_(value)
    return Snapshot(WeightId(1, version), MANIFEST, held.tensors, buffers=held.buffers)


class HubThread:
    """A hub on a thread of its own; coroutines of engines run on the same loop."""

    def __init__(self, config: Config) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.hub = self.run(self._start(config))
        self._engines: list[WeightEngine] = []

    async def _start(self, config: Config) -> Hub:
        hub = Hub(config, "run-1")
        await hub.start()
        self._running = asyncio.create_task(hub.run())
        return hub

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def engine(self, name: str, **behaviour: Any) -> WeightEngine:
        self._engines.append(self.run(self._make(name, **behaviour)))
        return self._engines[-1]

    async def _make(self, name: str, **behaviour: Any) -> WeightEngine:
        return await WeightEngine(name, **behaviour).join(self.hub.address)

    async def _end(self) -> None:
        for engine in self._engines:
            await engine.close()
        self._running.cancel()
        with suppress(asyncio.CancelledError, LearnerLost):
            await self._running

    def close(self) -> None:
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()


class Learner:
    """A connection that can lease and commit, and its publisher."""

    def __init__(self, hub: Hub, weights: WeightsConfig, spans: Path, backend: Backend) -> None:
        self.publisher: Publisher | None = None
        self.membership: Membership | None = None
        hello = Hello("learner", "learner", incarnation=1)
        self.client = BlockingClient(hub.address, hello, handler=self._handle)
        self._recorder = SpanRecorder(spans, "learner")
        self.publisher = Publisher(self.client, weights, backend, self._recorder)
        self.publisher.set_engines(self.membership.engines if self.membership else self.client.welcome.engines)

    async def _handle(self, message: Message) -> None:
        if isinstance(message, Membership):
            self.membership = message
            if self.publisher is not None:
                self.publisher.set_engines(message.engines)

    def train(self, version: int) -> None:
        batch = self.client.call(Lease(1, version, DEADLINE_S), DEADLINE_S * 2)
        assert isinstance(batch, Batch), batch
        assert self.client.call(Commit(1, version), DEADLINE_S) == Ok()

    def wait_for_engines(self, count: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(self.membership.engines if self.membership else self.client.welcome.engines) != count:
            assert time.monotonic() < deadline, f"never {count} engines"
            time.sleep(0.01)

    def publish(self, version: int) -> None:
        assert self.publisher is not None
        self.publisher.publish(snapshot(version), DEADLINE_S)
        self.publisher.wait_published(version, DEADLINE_S)

    def close(self) -> None:
        if self.publisher is not None:
            self.publisher.close()
        self.client.close()
        self._recorder.close()


@pytest.fixture
def hub() -> Iterator[HubThread]:
    thread = HubThread(make_config(heartbeat_timeout_s=2.0))
    yield thread
    thread.close()


MakeLearner = Callable[..., Learner]


@pytest.fixture
def make_learner(hub: HubThread, tmp_path: Path) -> Iterator[MakeLearner]:
    made: list[Learner] = []

    def make(
        publish: Literal["in_flight", "batch_boundary"] = "in_flight",
        timeout_s: float = 10.0,
        backend: Backend = "gloo",
    ) -> Learner:
        weights = WeightsConfig(publish=publish, timeout_s=timeout_s)
        made.append(Learner(hub.hub, weights, tmp_path / "spans.jsonl", backend))
        return made[-1]

    yield make
    for learner in made:
        learner.close()


@contextmanager
def engine_process(hub: Hub, name: str, *behaviour: str) -> Iterator[subprocess.Popen[str]]:
    """An engine that can be killed; where it halts on purpose, it says so on stdout."""
    program = Path(__file__).parent / "weight_engine.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), hub.address, name, *behaviour]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()


def check_holds(engine: WeightEngine, version: int) -> None:
    assert engine.weights == WeightId(1, version)
    for name, tensor in zip(("embed", "norm"), snapshot(version).tensors, strict=True):
        assert torch.equal(engine.tensors[name], tensor)
