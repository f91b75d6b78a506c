"""Several ranks of the learner send the weights: who sends what, that it arrives, and what becomes of failures."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from publishing import DEADLINE_S, HubThread, hub
from safetensors.torch import load_file
from torch import Tensor

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import EngineError
from slime_async.actors.worker import obey
from slime_async.learner.sources import divide, lanes, lanes_of_source, sources_of_lane
from slime_async.protocol import Deliver, EngineInfo, Granted, Hello, Message, Shutdown, TensorSpec, WeightManifest
from slime_async.trajectory import VersionSpan, WeightId
from slime_async.transport.client import HubClient
from slime_async.transport.errors import RemoteError
from slime_async.transport.weight_group import WeightGroupError
from slime_async.transport.weight_layout import shares_of
from tests.transport.examples import make_trajectory

__all__ = ["hub"]

JOB = Path(__file__).with_name("source_job.py")
TP2_PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}


@given(st.lists(st.integers(1, 1000), min_size=8, max_size=40), st.integers(1, 4), st.integers(1, 2), st.data())
def test_every_parameter_leaves_once_from_a_rank_that_holds_it_and_the_parts_are_balanced(
    sizes: list[int], stages: int, peers: int, data: st.DataObject
) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    held = [{name for name in named if int(name) % stages == rank // peers} for rank in range(stages * peers)]
    count = data.draw(st.sampled_from([stages, stages * peers]))
    source_of = divide(named, held, count)
    assert list(source_of) == list(named)
    assert all(name in held[rank] for name, rank in source_of.items())
    assert 0 in source_of.values()
    assert len(set(source_of.values())) == count
    for stage in range(stages):
        loads: dict[int, int] = {}
        for name in held[stage * peers]:
            loads[source_of[name]] = loads.get(source_of[name], 0) + named[name]
        largest = max(named[name] for name in held[stage * peers])
        assert max(loads.values()) - min(loads.values()) <= largest


def test_sources_are_spread_over_stages_first_and_then_away_from_tensor_parallel_peers() -> None:
    sizes = {"a": 10, "b": 10, "c": 9, "d": 9}
    whole, first, last = set(sizes), {"a", "b"}, {"c", "d"}
    assert set(divide(sizes, [first, first, last, last], 2).values()) == {0, 3}
    assert set(divide(sizes, [whole] * 4, 2).values()) == {0, 3}


def test_sources_that_do_not_hold_everything_or_have_nothing_to_send_are_refused() -> None:
    sizes = {"a": 1, "b": 1, "c": 1}
    with pytest.raises(ValueError, match=r"ranks \[0, 2\] of the learner do not hold 1 of 3 parameters, b among them"):
        divide(sizes, [{"a"}, {"b"}, {"c"}], 2)
    with pytest.raises(ValueError, match=r"weights.sources = 4, but the learner has 3 ranks: use 1 to 3"):
        divide(sizes, [{"a"}, {"b"}, {"c"}], 4)
    with pytest.raises(ValueError, match="leaves nothing for ranks"):
        divide({"a": 1}, [{"a"}, {"a"}], 2)


@given(st.integers(1, 6), st.integers(1, 9))
def test_sources_and_lanes_meet_in_the_same_step(sources: int, engines: int) -> None:
    dealt = lanes(range(engines), sources)
    assert sorted(engine for lane in dealt for engine in lane) == list(range(engines))
    steps = [sources_of_lane(number, sources) for number in range(len(dealt))]
    assert all(sorted(order) == list(range(sources)) for order in steps)
    for source in range(sources):
        wanted = sorted((steps[number].index(source), number) for number in range(len(dealt)))
        assert lanes_of_source(source, sources, len(dealt)) == [number for _, number in wanted]
        assert len({step for step, _ in wanted}) == len(wanted), "two lanes want the same source at once"


def test_shares_divide_a_manifest_in_order_or_are_refused() -> None:
    manifest = WeightManifest(tuple(TensorSpec(name, "float32", (2,)) for name in "xyz"))
    assert [[t.name for t in part.tensors] for part in shares_of(manifest, (1, 2), 2)] == [["x"], ["y", "z"]]
    assert shares_of(manifest, (), 1) == [manifest]
    for shares, groups in (((1, 1), 2), ((), 2), ((3,), 2)):
        with pytest.raises(ValueError, match="do not divide 3 tensors over 2 weight groups"):
            shares_of(manifest, shares, groups)


# ---------------------------------------------------------------------------------------------- real ranks, over gloo


class Recording(EmbeddedEngine):
    """Remembers what it received for each version."""

    received: list[dict[str, Tensor]]

    async def _receive_broadcast(
        self, manifest: WeightManifest, shares: Sequence[int], buffer_bytes: int
    ) -> dict[str, Tensor]:
        tensors = await super()._receive_broadcast(manifest, shares, buffer_bytes)
        self.received = [*getattr(self, "received", []), tensors]
        return tensors


class Actor:
    """One embedded engine, and trajectories out of nothing."""

    def __init__(self, name: str, checkpoint: Path) -> None:
        self.engine = Recording(checkpoint, engine_id=f"{name}/engine", slots=1, max_context=16)
        self._name = name
        self._weights = asyncio.Event()

    async def join(self, address: str) -> None:
        await self.engine.start()
        info = EngineInfo(self.engine.engine_id, self._name, 1, self.engine.takes_buffers)
        hello = Hello("actor", self._name, slots=8, engines=(info,), sources={"train": 100})
        self._client = await HubClient.connect(address, hello, handler=self._handle)

    async def _handle(self, message: Message) -> Message | None:
        if isinstance(message, Granted):
            self._delivering = asyncio.gather(*map(self._deliver, message.reservations))
        if isinstance(message, Granted | Shutdown):
            return None
        try:
            reply = await obey(message, self.engine)
        except (EngineError, WeightGroupError) as failed:
            raise RemoteError(type(failed).__name__, str(failed)) from failed
        if (await self.engine.status()).weights is not None:
            self._weights.set()
        return reply

    async def _deliver(self, reservation: Any) -> None:
        await self._weights.wait()
        spans = (VersionSpan(2, WeightId(1, 0)),)
        trajectory = make_trajectory(sample=reservation.sample, task=reservation.task, spans=spans)
        await self._client.call(Deliver(trajectory), 10.0)

    async def close(self) -> None:
        await self._client.close()
        await self.engine.close()


@contextmanager
def learner(hub: HubThread, checkpoint: Path, out: Path, ranks: int, **job: Any) -> Iterator[list[Any]]:
    """The ranks' processes, of which 0 and ``halt`` can be read."""
    out.mkdir()
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    whole = {"halt": -1, "how": "", "timeout_s": 10.0, **job}
    text = json.dumps({**whole, "hub": hub.hub.address, "checkpoint": str(checkpoint), "out": str(out)})
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(JOB), text],
            env=environment | {"RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def start_actors(hub: HubThread, checkpoint: Path) -> list[Actor]:
    actors = [Actor(name, checkpoint) for name in ("a", "b")]
    for actor in actors:
        hub.run(actor.join(hub.hub.address))
    return actors


def first_line(process: Any) -> str:
    """With a deadline of its own: whoever writes it has some, too."""
    line: str = process.stdout.readline()
    return line


def test_every_engine_gets_from_several_sources_what_one_would_send_though_one_breaks_at_first(
    hub: HubThread, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """Version 0 as it should be; of version 1 a source breaks in the middle, and fresh groups bring it all the same."""
    checkpoint = checkpoints("qwen3")
    actors = start_actors(hub, checkpoint)
    try:
        with learner(hub, checkpoint, tmp_path / "out", 4, layout=TP2_PP2, sources=4, halt=3, how="fail") as ranks:
            assert first_line(ranks[0]) == "published\n"
            before = load_file(checkpoint / "model.safetensors")
            after = load_file(tmp_path / "out" / "all.safetensors")
        for actor in actors:
            first, last = actor.engine.received[0], actor.engine.received[-1]
            assert first.keys() == last.keys() == after.keys()
            assert all(torch.equal(tensor, before[name]) for name, tensor in first.items())
            assert all(torch.equal(tensor, after[name]) for name, tensor in last.items())
            assert not torch.equal(first["model.norm.weight"], last["model.norm.weight"])
    finally:
        for actor in actors:
            hub.run(actor.close())


def test_a_source_that_is_killed_in_the_middle_fails_the_publication_at_once_and_by_name(
    hub: HubThread, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = checkpoints("qwen3")
    actors = start_actors(hub, checkpoint)
    layout = {"pipeline_model_parallel_size": 2}
    try:
        with learner(hub, checkpoint, tmp_path / "out", 2, layout=layout, sources=2, halt=1) as ranks:
            assert first_line(ranks[1]) == "halted\n"
            ranks[1].kill()
            killed = time.monotonic()
            assert "rank 1 of the learner, which sends" in first_line(ranks[0])
            assert time.monotonic() - killed < DEADLINE_S / 2
    finally:
        for actor in actors:
            hub.run(actor.close())
