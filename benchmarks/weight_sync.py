"""How long new weights take from the learner into an engine that generates, and what they hold up meanwhile.

    python -m benchmarks.weight_sync                          two GPUs: learner on the first, SGLang on the second, NCCL
    python -m benchmarks.weight_sync --device cpu             a smoke test: tiny model, embedded engine, gloo
    options: --shape qwen3-4b|tiny  --rounds 10  --requests 64  --out benchmarks/results/weight_sync.json

One run measures, on the same bytes: conversion from Megatron's tensors into the buffers; a raw broadcast of one flat
tensor to a bare process; the publication as the publisher does it (pause, one call with a broadcast per tensor beside
the conversion, resume) with requests in flight; and 512 MB a call. A model of 30B-A3B's size is computed from that.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["NCCL_CUMEM_ENABLE"] = "0"  # as SGLang has it: the two sides of a broadcast must agree

import torch

from benchmarks.weight_sync_models import SHAPES, SUPPORTED_GPU_ARGUMENTS, make_config, write_random_checkpoint
from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import Engine, GenerateRequest, PauseMode, SamplingParams
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.actors.sglang.server import LaunchSpec
from slime_async.learner.snapshots import Snapshots
from slime_async.learner.trainer import Trainer
from slime_async.protocol import TensorSpec, WeightGroupSpec, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.weight_group import WeightGroup, host_group, torch_dtype

BUCKET_BYTES = 512 << 20
TIMEOUT_S = 120.0
CONTEXT = 4096
PARAMETERS_30B_A3B = 30.5e9


@dataclass(slots=True)
class Round:
    """One publication."""

    pause_to_resume_s: float
    broadcast_s: float
    learner_s: float
    """That the training thread spent in it"""


class Bench:
    """A learner, an engine, and the group between them."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.gpu = arguments.device == "cuda"
        self.backend: Literal["gloo", "nccl"] = "nccl" if self.gpu else "gloo"
        self.rounds, self.requests = arguments.rounds, arguments.requests
        self.directory = directory
        self.checkpoint = directory / "model"
        write_random_checkpoint(self.checkpoint, arguments.shape, "cuda" if self.gpu else "cpu")
        self.trainer = Trainer.build(make_config(self.checkpoint, arguments.shape), self.checkpoint)
        self.snapshots = Snapshots(self.trainer.manifest(), self.trainer.device)
        self.manifest = self.trainer.manifest()
        self.bytes = sum(_size(spec) for spec in self.manifest.tensors)
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

    async def raw_broadcast_s(self) -> list[float]:
        """One flat tensor of the same bytes, to a process that does nothing else."""
        flat = torch.empty(self.bytes, dtype=torch.uint8, device=self.trainer.device)
        spec, store = host_group("raw", 1, 2, self.backend, TIMEOUT_S)
        command = [sys.executable, "-m", "benchmarks.weight_sync", "--peer", json.dumps(asdict(spec))]
        command += ["--peer-bytes", str(self.bytes), "--rounds", str(self.rounds + 1)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"} if self.gpu else dict(os.environ)
        peer = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
        group = await asyncio.to_thread(WeightGroup.create, spec, 0)
        del store
        assert peer.stdout is not None
        times = []
        for _ in range(self.rounds + 1):
            begun = time.perf_counter()
            await asyncio.to_thread(group.send, [("flat", flat)])
            await peer.stdout.readline()
            times.append(time.perf_counter() - begun)
        await peer.wait()
        group.close()
        return times[1:]  # the first one connects

    # ------------------------------------------------------------------------------------ with an engine

    def make_engine(self) -> Engine:
        if not self.gpu:
            return EmbeddedEngine(self.checkpoint, slots=self.requests, max_context=CONTEXT, weights=WeightId(1, 0))
        arguments = server_arguments(self.checkpoint, CONTEXT, SUPPORTED_GPU_ARGUMENTS)
        launch = LaunchSpec(arguments, self.directory / "sglang.log", devices=(1,))
        return SGLangEngine(self.checkpoint, engine_id="bench", launch=launch, max_context=CONTEXT)

    async def publish(self, engine: Engine, group: WeightGroup, thread: ThreadPoolExecutor) -> Round:
        """As the publisher does it; the training thread's part is what it holds up."""
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
        filling = loop.run_in_executor(thread, fill)
        await asyncio.to_thread(snapshot.wait_begun, TIMEOUT_S)
        paused = time.perf_counter()
        await engine.pause(PauseMode.IN_PLACE)
        sent = time.perf_counter()
        await asyncio.gather(
            engine.receive_weights(self.manifest, weights),
            asyncio.to_thread(group.send, snapshot.arriving(TIMEOUT_S)),
        )
        received = time.perf_counter()
        await engine.resume()
        return Round(time.perf_counter() - paused, received - sent, await filling)

    async def bucketed_s(self, engine: Engine, group: WeightGroup) -> float:
        """The same tensors, 512 MB a call."""
        snapshot = self.snapshots.begin(WeightId(1, self.version))
        self.snapshots.fill(snapshot, self.trainer.export)
        snapshot.wait_filled(TIMEOUT_S)
        tensors = iter(zip((spec.name for spec in self.manifest.tensors), snapshot.tensors, strict=True))
        await engine.pause(PauseMode.IN_PLACE)
        begun = time.perf_counter()
        for bucket in _buckets(self.manifest):
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
    conversion = [bench.conversion_s() for _ in range(bench.rounds + 2)][2:]  # two sets of buffers are new
    raw = await bench.raw_broadcast_s()
    engine = bench.make_engine()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        await engine.start()
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
        rounds = [await bench.publish(engine, group, thread) for _ in range(bench.rounds)]
        in_flight = engine.in_flight_at_update
        bucketed = [await bench.bucketed_s(engine, group) for _ in range(bench.rounds)]
        lost = 0
        for request in list(answers):
            answer = await request
            lost += answer.finish_reason != "length"
    median = statistics.median
    broadcast_s, raw_s, conversion_s = median(r.broadcast_s for r in rounds), median(raw), median(conversion)
    figures = {
        "broadcast_over_raw": raw_s / broadcast_s,
        "broadcast_gbps": bench.bytes / broadcast_s / 1e9,
        "pause_to_resume_ms": 1e3 * median(r.pause_to_resume_s for r in rounds),
        "learner_stall_ms": 1e3 * max(0.0, median(r.learner_s for r in rounds) - conversion_s),
        "bucketed_512mb_ms": 1e3 * median(bucketed),
        "requests_lost": float(lost),
    }
    details = {
        "bytes": bench.bytes,
        "tensors": len(bench.manifest.tensors),
        "requests_in_flight": in_flight,
        "conversion_ms": 1e3 * conversion_s,
        "conversion_gbps": bench.bytes / conversion_s / 1e9,
        "broadcast_ms": 1e3 * broadcast_s,
        "raw_broadcast_ms": 1e3 * raw_s,
        "raw_broadcast_gbps": bench.bytes / raw_s / 1e9,
        "rounds": [asdict(r) for r in rounds],
        "computed_30b_a3b": _computed(bench.bytes, conversion_s, broadcast_s, rounds),
    }
    return figures, details


def _computed(measured_bytes: int, conversion_s: float, broadcast_s: float, rounds: list[Round]) -> dict[str, float]:
    """What 30B-A3B in bf16 would cost at the measured rates: bytes scale, the calls around them do not."""
    size = 2 * PARAMETERS_30B_A3B
    scale = size / measured_bytes
    around_s = statistics.median(r.pause_to_resume_s - r.broadcast_s for r in rounds)
    return {
        "bytes": size,
        "conversion_ms": 1e3 * scale * conversion_s,
        "broadcast_ms": 1e3 * scale * broadcast_s,
        "pause_to_resume_ms": 1e3 * (scale * broadcast_s + around_s),
    }


def peer(spec: WeightGroupSpec, size: int, rounds: int) -> None:
    """The other end of the raw broadcast."""
    device = "cuda" if spec.backend == "nccl" else "cpu"
    group = WeightGroup.create(spec, 1)
    manifest = WeightManifest((TensorSpec("flat", "uint8", (size,)),))
    for _ in range(rounds):
        group.receive(manifest, device)
        print("received", flush=True)
    group.close()


def _request(i: int) -> GenerateRequest:
    sampling = SamplingParams(CONTEXT - 64, seed=i)
    return GenerateRequest(uuid.uuid4().hex, [1 + (7 * i + j) % 30 for j in range(32)], sampling)


def _size(spec: TensorSpec) -> int:
    return int(torch.Size(spec.shape).numel()) * torch_dtype(spec.dtype).itemsize


def _buckets(manifest: WeightManifest) -> Iterator[WeightManifest]:
    bucket: list[TensorSpec] = []
    for spec in manifest.tensors:
        if bucket and sum(map(_size, bucket)) + _size(spec) > BUCKET_BYTES:
            yield WeightManifest(tuple(bucket))
            bucket = []
        bucket.append(spec)
    yield WeightManifest(tuple(bucket))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), help="[qwen3-4b on GPUs, tiny on the CPU]")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=64, help="in flight while weights change")
    parser.add_argument("--out", type=Path, help="where the JSON goes [benchmarks/results/weight_sync.json on GPUs]")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--peer-bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(WeightGroupSpec(**json.loads(arguments.peer)), arguments.peer_bytes, arguments.rounds)
        return
    gpu = arguments.device == "cuda"
    if gpu and torch.cuda.device_count() < 2:
        parser.error("needs two GPUs, one for the learner and one for the engine; --device cpu is a smoke test")
    arguments.shape = arguments.shape or ("qwen3-4b" if gpu else "tiny")
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(arguments, Path(directory))
        figures, details = asyncio.run(measure(bench))
        bench.trainer.close()
    for name, value in figures.items():
        print(f"| {name} | {value:.4g} |")
    out = arguments.out or (Path("benchmarks/results/weight_sync.json") if gpu else None)
    if out:
        machine = torch.cuda.get_device_name(0) if gpu else platform.machine()
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": machine}
        text = {"figures": figures, "details": details, "shape": arguments.shape, "environment": environment}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    main()
