"""How long new weights take from the learner into an engine that generates, and what they hold up meanwhile.

    python -m benchmarks.weight_sync                          two GPUs: learner on the first, SGLang on the second, NCCL
    python -m benchmarks.weight_sync --device cpu             a smoke test: tiny model, embedded engine, gloo
    options: --shape qwen3-4b|tiny  --rounds 10  --requests 64  --out benchmarks/results/weight_sync.json

One run measures, on the same bytes: conversion from Megatron's tensors into the buffers; a raw broadcast of one flat
tensor to a bare process, and of as many tensors as the model has; the publication as the publisher does it (pause, one
call with a broadcast per buffer, resume) with requests in flight, the same beside the thread that converts, the same
with a broadcast per tensor as SGLang itself receives them, and 512 MB a call. ``broadcast`` is the collectives alone,
by the device's clock as the raw one is, ``update`` all between pause and resume: the call, the broadcast, the copies
into the model. What Qwen3-30B-A3B would cost is computed from these rates and from raw broadcasts of some of its
layers, whose tensors are many and small.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

os.environ["NCCL_CUMEM_ENABLE"] = "0"  # as SGLang has it: the two sides of a broadcast must agree

import torch

from benchmarks.weight_sync_models import (
    LAYERS_IN_30B_A3B,
    SHAPES,
    SUPPORTED_GPU_ARGUMENTS,
    layers_30b_a3b,
    make_config,
    weight_sizes,
    write_config,
    write_random_weights,
)
from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import Engine, GenerateRequest, PauseMode, SamplingParams
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.actors.sglang.server import LaunchSpec
from slime_async.actors.sglang.versions import installed_version
from slime_async.config.schema import WeightsConfig
from slime_async.learner.snapshots import Snapshots
from slime_async.learner.trainer import Trainer
from slime_async.protocol import TensorSpec, WeightGroupSpec, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.weight_group import Transfer, WeightGroup, host_group
from slime_async.transport.weight_layout import buffers_of, consecutive_parts, tensor_bytes

BUFFER_BYTES = WeightsConfig().buffer_bytes
CALL_BYTES = 512 << 20
TIMEOUT_S = 120.0
START_TIMEOUT_S = 400.0
BEGUN_S = time.monotonic()
CONTEXT = 4096
ANSWER_TOKENS = 384
"""They outlast all publications"""
LAYERS_MEASURED = 8
"""Of the 48 that 30B-A3B has: 10 GB fit beside what is there"""


@dataclass(slots=True)
class Round:
    """One publication."""

    pause_to_resume_s: float
    broadcast_s: float
    """From the call to the engine's word that it uses the weights: HTTP, broadcast, copies into the model"""
    transfer: Transfer
    """Of the broadcast itself"""
    learner_s: float
    """That the training thread spent in it"""
    in_flight: int
    """Requests that were being sampled when the weights changed"""


class RawPeer:
    """A process that only receives tensors of so many bytes, one after the other, behind one that is not timed."""

    def __init__(self, bench: Bench, sizes: Sequence[int]) -> None:
        self._gpu, self._rounds, self._sizes = bench.gpu, bench.rounds + 1, [1, *sizes]
        self._spec, self._store = host_group(f"raw-{len(sizes)}", 1, 2, bench.backend, START_TIMEOUT_S)
        self._peer: asyncio.subprocess.Process | None = None

    async def launch(self) -> None:
        """What it imports takes a while; it waits for ``broadcast_s``."""
        command = [sys.executable, "-m", "benchmarks.weight_sync", "--peer", json.dumps(asdict(self._spec))]
        command += ["--rounds", str(self._rounds), "--peer-sizes", ",".join(map(str, self._sizes))]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"} if self._gpu else dict(os.environ)
        self._peer = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)

    async def broadcast_s(self) -> list[float]:
        """Seconds of every round, from the first tensor's end to the last one's."""
        assert self._peer is not None
        assert self._peer.stdout is not None
        flat = torch.empty(max(self._sizes), dtype=torch.uint8, device="cuda" if self._gpu else "cpu")
        tensors = [(str(i), flat[:size]) for i, size in enumerate(self._sizes)]
        group = await asyncio.to_thread(WeightGroup.create, self._spec, 0)
        times = []
        for _ in range(self._rounds):
            await asyncio.to_thread(group.send, tensors)
            async with asyncio.timeout(TIMEOUT_S):
                assert await self._peer.stdout.readline(), "the raw peer died"
            times.append(group.transfer.seconds)
        await self._peer.wait()
        group.close()
        return times[1:]  # the first one connects

    def end(self) -> None:
        if self._peer is not None and self._peer.returncode is None:
            self._peer.kill()


class Bench:
    """A learner, an engine, and the group between them."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.gpu = arguments.device == "cuda"
        self.backend: Literal["gloo", "nccl"] = "nccl" if self.gpu else "gloo"
        self.rounds, self.requests = arguments.rounds, arguments.requests
        self.directory = directory
        self.shape, self.device = arguments.shape, "cuda" if self.gpu else "cpu"
        self.checkpoint = directory / "model"
        self.config = write_config(self.checkpoint, self.shape, self.device)
        self.sizes = weight_sizes(self.config)
        self.bytes = sum(self.sizes)

    def build(self) -> None:
        """The learner's side; on GPUs while the server starts beside it."""
        write_random_weights(self.checkpoint, self.config, self.device)
        if self.gpu:
            torch.cuda.empty_cache()
        config = make_config(self.checkpoint, self.shape)
        self.trainer = Trainer.build(config, self.checkpoint, random_weights=True)
        self.snapshots = Snapshots(self.trainer.manifest(), self.trainer.device, BUFFER_BYTES)
        self.manifest = self.trainer.manifest()
        assert self.bytes == sum(map(tensor_bytes, self.manifest.tensors))
        self.version = 0

    # ------------------------------------------------------------------------------------------- alone

    def conversion_s(self) -> float:
        """Of filling one set of buffers, alone, to its end on the device."""
        snapshot = self.snapshots.begin(WeightId(1, self.version))
        self._synchronize()
        begun = time.perf_counter()
        self.snapshots.fill(snapshot, self.trainer.export)
        self._synchronize()
        return time.perf_counter() - begun

    # ------------------------------------------------------------------------------------ with an engine

    def make_engine(self) -> Engine:
        if not self.gpu:
            return EmbeddedEngine(self.checkpoint, slots=self.requests, max_context=CONTEXT, weights=WeightId(1, 0))
        arguments = server_arguments(self.checkpoint, CONTEXT, SUPPORTED_GPU_ARGUMENTS)
        launch = LaunchSpec(arguments, self.directory / "sglang.log", devices=(1,))
        return SGLangEngine(self.checkpoint, engine_id="bench", launch=launch, max_context=CONTEXT)

    async def publish(
        self,
        engine: Engine,
        group: WeightGroup,
        thread: ThreadPoolExecutor,
        *,
        beside: bool = False,
        by_tensor: bool = False,
    ) -> Round:
        """As the publisher does it; the training thread's part is what it holds up.

        Not as the publisher does it: ``beside``, without waiting for the thread that queues the conversions;
        ``by_tensor``, with a broadcast of each, though the engine takes buffers.
        """
        loop = asyncio.get_running_loop()
        self.version += 1
        weights = WeightId(1, self.version)
        snapshot = self.snapshots.begin(weights)

        def fill() -> float:
            begun = time.perf_counter()
            self.snapshots.fill(snapshot, self.trainer.export)
            self._synchronize()
            return time.perf_counter() - begun

        await engine.check_weights(self.manifest)
        whole = engine.takes_buffers and not by_tensor
        filling = loop.run_in_executor(thread, fill)
        if not beside:
            await asyncio.to_thread(snapshot.wait_queued, TIMEOUT_S)
        paused = time.perf_counter()
        await engine.pause(PauseMode.IN_PLACE)
        sent = time.perf_counter()
        await asyncio.gather(
            engine.receive_weights(self.manifest, weights, buffer_bytes=BUFFER_BYTES if whole else 0),
            asyncio.to_thread(group.send, snapshot.arriving(TIMEOUT_S, whole_buffers=whole)),
        )
        received = time.perf_counter()
        await engine.resume()
        resumed = time.perf_counter()
        return Round(resumed - paused, received - sent, group.transfer, await filling, engine.in_flight_at_update)

    async def bucketed_s(self, engine: Engine, group: WeightGroup) -> float:
        """The same tensors, 512 MB a call."""
        snapshot = self.snapshots.begin(WeightId(1, self.version))
        self.snapshots.fill(snapshot, self.trainer.export)
        snapshot.wait_filled(TIMEOUT_S)
        tensors = iter(zip((spec.name for spec in self.manifest.tensors), snapshot.tensors, strict=True))
        await engine.pause(PauseMode.IN_PLACE)
        begun = time.perf_counter()
        for bucket in map(WeightManifest, map(tuple, consecutive_parts(self.manifest, CALL_BYTES))):
            part = [next(tensors) for _ in bucket.tensors]
            await asyncio.gather(
                engine.receive_weights(bucket, WeightId(1, self.version)), asyncio.to_thread(group.send, part)
            )
        taken = time.perf_counter() - begun
        await engine.resume()
        return taken

    def _synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()


async def measure(bench: Bench) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures, and what else is worth keeping."""
    engine = bench.make_engine()
    raw_peer, parts_peer = RawPeer(bench, [bench.bytes]), RawPeer(bench, bench.sizes)
    layers = layers_30b_a3b(LAYERS_MEASURED if bench.gpu else 0)
    layers_peer, buffers_peer = RawPeer(bench, layers), RawPeer(bench, in_buffers(layers))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        peers = raw_peer, parts_peer, layers_peer, buffers_peer
        for other in peers:
            stack.callback(other.end)
            await other.launch()
        building = asyncio.create_task(asyncio.to_thread(bench.build))
        if not bench.gpu:
            await building  # the embedded engine starts with the checkpoint's weights, a server with random ones
        await engine.start()
        await building
        say("learner and engine are there")
        conversion = [bench.conversion_s() for _ in range(bench.rounds + 2)][2:]  # two sets of buffers are new
        raw, parts, layers_s, buffers_s = [await peer.broadcast_s() for peer in peers]
        say("measured alone")
        spec, store = host_group("weights", 1, 1 + engine.num_ranks, bench.backend, TIMEOUT_S)
        group, _ = await asyncio.gather(
            asyncio.to_thread(WeightGroup.create, spec, 0), engine.join_weight_group(spec, 1)
        )
        del store
        stack.callback(group.close)
        thread = stack.enter_context(ThreadPoolExecutor(1))
        await bench.publish(engine, group, thread)  # connects, and brings the first weights
        answers = [asyncio.create_task(engine.generate(_request(i))) for i in range(bench.requests)]
        while (await engine.status()).running_requests < bench.requests:
            await asyncio.sleep(0.01)
        say(f"{bench.requests} requests are in flight")
        rounds = [await bench.publish(engine, group, thread) for _ in range(bench.rounds)]
        beside = [await bench.publish(engine, group, thread, beside=True) for _ in range(bench.rounds)]
        by_tensor = [await bench.publish(engine, group, thread, by_tensor=True) for _ in range(bench.rounds)]
        bucketed = [await bench.bucketed_s(engine, group) for _ in range(bench.rounds)]
        say("published")
        lost = 0
        for request in list(answers):
            answer = await request
            lost += answer.finish_reason != "length"
    median = statistics.median
    broadcast_s, raw_s, conversion_s = median(r.broadcast_s for r in rounds), median(raw), median(conversion)
    rate = median(r.transfer.rate for r in rounds)
    figures = {
        "broadcast_over_raw": rate * raw_s / bench.bytes,
        "broadcast_gbps": rate / 1e9,
        "update_over_raw": raw_s / broadcast_s,
        "update_gbps": bench.bytes / broadcast_s / 1e9,
        "pause_to_resume_ms": 1e3 * median(r.pause_to_resume_s for r in rounds),
        "learner_stall_ms": 1e3 * max(0.0, median(r.learner_s for r in rounds) - conversion_s),
        "bucketed_512mb_ms": 1e3 * median(bucketed),
        "requests_lost": float(lost),
    }
    details = {
        "bytes": bench.bytes,
        "tensors": len(bench.manifest.tensors),
        "requests_in_flight": min(r.in_flight for r in rounds),
        "conversion_ms": 1e3 * conversion_s,
        "conversion_gbps": bench.bytes / conversion_s / 1e9,
        "update_ms": 1e3 * broadcast_s,
        "raw_broadcast_ms": 1e3 * raw_s,
        "raw_broadcast_gbps": bench.bytes / raw_s / 1e9,
        "raw_by_tensor_over_raw": raw_s / median(parts),
        "beside_conversion_over_raw": raw_s / bench.bytes * median(r.transfer.rate for r in beside),
        "beside_conversion_pause_to_resume_ms": 1e3 * median(r.pause_to_resume_s for r in beside),
        "by_tensor_over_raw": raw_s / bench.bytes * median(r.transfer.rate for r in by_tensor),
        "by_tensor_pause_to_resume_ms": 1e3 * median(r.pause_to_resume_s for r in by_tensor),
        "rounds": [asdict(r) for r in rounds],
        "computed_30b_a3b": _computed(bench, conversion_s, median(layers_s), median(buffers_s), rounds)
        if bench.gpu
        else None,
    }
    return figures, details


def say(what: str) -> None:
    print(f"{time.monotonic() - BEGUN_S:6.1f} s  {what}", flush=True)


def in_buffers(sizes: Sequence[int]) -> list[int]:
    """What ``buffers_of`` makes of tensors of these sizes."""
    manifest = WeightManifest(tuple(TensorSpec(str(i), "uint8", (size,)) for i, size in enumerate(sizes)))
    return [layout.nbytes for layout in buffers_of(manifest, BUFFER_BYTES)]


def _computed(
    bench: Bench, conversion_s: float, layers_s: float, buffers_s: float, rounds: list[Round]
) -> dict[str, float]:
    """What 30B-A3B in bf16 would cost between one learner rank and one engine rank, at the rates of this run.

    Conversion and broadcast scale with what is moved, the calls around them don't. Not in it: what the server does with
    128 experts' tensors a layer.
    """
    layers = layers_30b_a3b(LAYERS_IN_30B_A3B)
    size = sum(layers)
    scale = size / sum(layers_30b_a3b(LAYERS_MEASURED))
    around_s = statistics.median(r.pause_to_resume_s - r.transfer.seconds for r in rounds)
    return {
        "bytes": float(size),
        "tensors": float(len(layers)),
        "conversion_ms": 1e3 * conversion_s * size / bench.bytes,
        "broadcast_ms": 1e3 * scale * buffers_s,
        "broadcast_gbps": size / (scale * buffers_s) / 1e9,
        "by_tensor_broadcast_ms": 1e3 * scale * layers_s,
        "pause_to_resume_ms": 1e3 * (scale * buffers_s + around_s),
    }


def peer(spec: WeightGroupSpec, sizes: Sequence[int], rounds: int) -> None:
    """The other end of the raw broadcast."""
    device = "cuda" if spec.backend == "nccl" else "cpu"
    group = WeightGroup.create(spec, 1)
    manifest = WeightManifest(tuple(TensorSpec(str(i), "uint8", (size,)) for i, size in enumerate(sizes)))
    for _ in range(rounds):
        group.receive(manifest, device)
        print("received", flush=True)
    group.close()


def _request(i: int) -> GenerateRequest:
    sampling = SamplingParams(ANSWER_TOKENS, seed=i)
    return GenerateRequest(uuid.uuid4().hex, [1 + (7 * i + j) % 30 for j in range(32)], sampling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), help="[qwen3-4b on GPUs, tiny on the CPU]")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=64, help="in flight while weights change")
    parser.add_argument("--out", type=Path, help="where the JSON goes [benchmarks/results/weight_sync.json on GPUs]")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--peer-sizes", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        sizes = [int(size) for size in arguments.peer_sizes.split(",")]
        peer(WeightGroupSpec(**json.loads(arguments.peer)), sizes, arguments.rounds)
        return
    gpu = arguments.device == "cuda"
    if gpu and torch.cuda.device_count() < 2:
        parser.error("needs two GPUs, one for the learner and one for the engine; --device cpu is a smoke test")
    arguments.shape = arguments.shape or ("qwen3-4b" if gpu else "tiny")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(arguments, Path(directory))
        figures, details = asyncio.run(measure(bench))
        bench.trainer.close()
    report(arguments, figures, details)


def report(arguments: argparse.Namespace, figures: dict[str, float], details: dict[str, Any]) -> None:
    print("| figure | value |\n| --- | --- |")
    for name, value in {**figures, **details}.items():
        if isinstance(value, int | float):
            print(f"| {name} | {value:.4g} |")
    gpu = arguments.device == "cuda"
    out = arguments.out or (Path("benchmarks/results/weight_sync.json") if gpu else None)
    if out is None:
        return
    machine = f"2 × {torch.cuda.get_device_name(0)}" if gpu else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if gpu:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        versions |= {"nccl": nccl, "cuda": str(torch.version.cuda), "sglang": installed_version()}
    text = {
        "command": f"python -m benchmarks.weight_sync --rounds {arguments.rounds} --requests {arguments.requests}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": versions,
        "shape": arguments.shape,
        "figures": figures,
        "details": details,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    main()
