"""The publisher with a real hub and real gloo groups; engines are actors in this process or in one of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import torch
from weight_engine import IN_FLIGHT, PHASES, WeightEngine

from slime_async.config import Config
from slime_async.config.schema import WeightsConfig
from slime_async.learner.publisher import Publisher, PublishError, Snapshot
from slime_async.protocol import (
    Batch,
    Commit,
    GetStatus,
    Hello,
    Lease,
    Membership,
    Message,
    Ok,
    RunStatus,
    TensorSpec,
    WeightManifest,
)
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
    tensors = torch.full((4, 3), float(version)), torch.full((3,), version + 0.5, dtype=torch.bfloat16)
    return Snapshot(WeightId(1, version), MANIFEST, tensors)


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

    def engine(self, name: str, *, refuse: bool = False) -> WeightEngine:
        self._engines.append(self.run(self._make(name, refuse)))
        return self._engines[-1]

    async def _make(self, name: str, refuse: bool) -> WeightEngine:
        return await WeightEngine(name, refuse=refuse).join(self.hub.address)

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

    def __init__(self, hub: Hub, weights: WeightsConfig, spans: Path) -> None:
        self.publisher: Publisher | None = None
        self.membership: Membership | None = None
        hello = Hello("learner", "learner", incarnation=1)
        self.client = BlockingClient.connect(hub.address, hello, handler=self._handle)
        self._recorder = SpanRecorder(spans, "learner")
        self.publisher = Publisher(self.client, weights, "gloo", self._recorder)
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

    def make(publish: Literal["in_flight", "batch_boundary"] = "in_flight", timeout_s: float = 10.0) -> Learner:
        weights = WeightsConfig(publish=publish, timeout_s=timeout_s)
        made.append(Learner(hub.hub, weights, tmp_path / "spans.jsonl"))
        return made[-1]

    yield make
    for learner in made:
        learner.close()


@contextmanager
def engine_process(hub: Hub, name: str) -> Iterator[subprocess.Popen[bytes]]:
    program = Path(__file__).parent / "weight_engine.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(program), hub.address, name], env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE_S)


def check_holds(engine: WeightEngine, version: int) -> None:
    assert engine.weights == WeightId(1, version)
    for name, tensor in zip(("embed", "norm"), snapshot(version).tensors, strict=True):
        assert torch.equal(engine.tensors[name], tensor)


def test_every_version_arrives_at_every_engine(hub: HubThread, make_learner: MakeLearner) -> None:
    engines = [hub.engine("a"), hub.engine("b")]
    learner = make_learner()
    assert learner.publisher is not None
    for version in range(3):
        learner.publish(version)
        for engine in engines:
            check_holds(engine, version)
        learner.train(version)
    status = learner.client.call(GetStatus(), DEADLINE_S)
    assert isinstance(status, RunStatus)
    assert status.queue["published_version"] == 2
    times = learner.publisher.take_times()
    assert [t.weights.version for t in times] == [0, 1, 2]
    assert {(t.engines, t.requests_in_flight) for t in times} == {(2, 2 * IN_FLIGHT)}
    assert all(0 < t.broadcast_s <= t.pause_to_resume_s <= t.total_s for t in times)
    assert not learner.publisher.take_times()
    # the group is formed once, then every publication goes through the same phases
    assert engines[0].heard == ["PrepareWeights", "JoinWeightGroup", *PHASES, *["PrepareWeights", *PHASES] * 2]


def test_a_late_joiner_gets_the_current_version_though_nothing_new_is_published(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    first = hub.engine("first")
    learner = make_learner()
    learner.publish(0)
    late = hub.engine("late")
    hub.run(late.holds(0))
    check_holds(late, 0)
    check_holds(first, 0)
    learner.train(0)
    learner.publish(1)
    check_holds(late, 1)


def test_a_snapshot_waits_for_the_first_engine(hub: HubThread, make_learner: MakeLearner) -> None:
    learner = make_learner()
    assert learner.publisher is not None
    learner.publisher.publish(snapshot(0), DEADLINE_S)
    with pytest.raises(TimeoutError, match=r"waited 0 s for an engine to take version 0; engines known: \[\]"):
        learner.publisher.wait_published(0, 0.01)
    with pytest.raises(TimeoutError, match="waited 0 s for publication of version 1"):
        learner.publisher.publish(snapshot(1), 0.01)
    engine = hub.engine("a")
    learner.publisher.wait_published(0, DEADLINE_S)
    check_holds(engine, 0)


def test_a_killed_engine_does_not_keep_the_others_from_the_next_version(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    survivor = hub.engine("survivor")
    learner = make_learner()
    assert learner.publisher is not None
    with engine_process(hub.hub, "victim") as victim:
        while len(learner.membership.engines if learner.membership else ()) < 2:
            assert victim.poll() is None
        learner.publish(0)
        assert learner.publisher.take_times()[-1].engines == 2
        victim.kill()
        learner.train(0)
        learner.publish(1)
    check_holds(survivor, 1)
    assert learner.publisher.take_times()[-1].engines == 1
    assert survivor.heard[-3:] == PHASES
    learner.publisher.check()


def test_publishing_at_batch_boundaries_drains_first(hub: HubThread, make_learner: MakeLearner) -> None:
    engine = hub.engine("a")
    learner = make_learner("batch_boundary")
    for version in range(3):
        learner.publish(version)
        check_holds(engine, version)
        learner.train(version)


def test_a_publication_that_cannot_succeed_fails_and_says_what_the_engine_said(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    hub.engine("wrong", refuse=True)
    learner = make_learner(timeout_s=0.5)
    assert learner.publisher is not None
    learner.publisher.check()
    learner.publisher.publish(snapshot(0), DEADLINE_S)
    with pytest.raises(PublishError, match=r"version 0 .* in 5 attempts.*lm_head has another shape here"):
        learner.publisher.wait_published(0, DEADLINE_S)
    with pytest.raises(PublishError, match="the publisher failed"):
        learner.publisher.check()
    with pytest.raises(PublishError, match="the publisher failed"):
        learner.publisher.publish(snapshot(1), DEADLINE_S)
