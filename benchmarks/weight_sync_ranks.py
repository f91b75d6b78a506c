"""Weight sync from a learner of several ranks to several engines: one source rank against several, beside raw NCCL.

    python -m benchmarks.weight_sync_ranks                8 GPUs: learner on 4, engines on 4; half and half of 4 or 2
    python -m benchmarks.weight_sync_ranks --device cpu   a rehearsal: tiny model, gloo, embedded engines
    options: --shapes qwen3-4b qwen3-14b  --rounds 10  --timeout-s 120  --out benchmarks/results/weight_sync_ranks.json

For every shape, learner layout and engine layout it publishes with one source and with as many as there are ranks, by
the learner's own publisher, a hub and real engines, whose values are not looked at. ``unique`` is the model's bytes
over the time of the broadcast, calls and copies into the model included: what is sent to several engines counts once.
``raw`` sends the same bytes as flat tensors between bare processes, in the same groups and the same order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["NCCL_CUMEM_ENABLE"] = "0"  # as SGLang has it: the two sides of a broadcast must agree

import torch

from benchmarks.weight_sync_models import (
    SHAPES,
    SUPPORTED_GPU_ARGUMENTS,
    weight_sizes,
    write_config,
    write_random_weights,
)
from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import Engine, EngineError
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.actors.sglang.server import LaunchSpec, free_port
from slime_async.actors.worker import obey
from slime_async.config import Config
from slime_async.learner.publisher import Publisher
from slime_async.learner.sources import lanes, lanes_of_source, sources_of_lane
from slime_async.learner.trainer import Trainer
from slime_async.learner.weights_outlet import FollowingOutlet, PublishingOutlet, WeightShare
from slime_async.protocol import (
    EngineInfo,
    Granted,
    Hello,
    Membership,
    Message,
    Ok,
    Published,
    Shutdown,
    TensorSpec,
    WeightGroupSpec,
    WeightManifest,
)
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.client import HubClient
from slime_async.transport.errors import RemoteError
from slime_async.transport.hub import Hub
from slime_async.transport.weight_group import WeightGroup, WeightGroupError

START_TIMEOUT_S = 400.0
"""For a server, or for a learner of several ranks"""
CONTEXT = 1024
BEGUN_S = time.monotonic()


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread over ranks."""

    name: str
    megatron: dict[str, Any]
    ranks: int


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    4: (Layout("TP2xDP2", TP2, 4), Layout("PP2xTP2", {**PP2, **TP2}, 4)),
    2: (Layout("TP2", TP2, 2), Layout("PP2", PP2, 2)),
    1: (Layout("one rank", {}, 1),),
}
"""By the learner's GPUs"""


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank of a learner is told."""

    hub: str
    checkpoint: str
    layout: dict[str, Any]
    dtype: str
    ranks: int
    sources: int
    rounds: int
    engines: int
    timeout_s: float
    spans: str

    def config(self) -> Config:
        return Config.model_validate(
            {
                "model": {"path": self.checkpoint, "dtype": self.dtype},
                "learner": {"ranks": self.ranks},
                "megatron": self.layout,
                "weights": {"sources": self.sources, "timeout_s": self.timeout_s},
            }
        )


# ------------------------------------------------------------------------------------------------ the learner's side


def rank_job(job: Job) -> None:
    """One rank: publishes ``rounds`` versions after the first, which connects; rank 0 prints what they took."""
    torch.set_num_threads(1)
    config = job.config()
    trainer = Trainer.build(config, Path(job.checkpoint), random_weights=True)
    share = WeightShare.agree(config, trainer, "127.0.0.1")
    if int(os.environ["RANK"]):
        following = FollowingOutlet(share, START_TIMEOUT_S)
        for version in range(job.rounds + 1):
            following.publish(trainer, WeightId(1, version))
        sys.stdin.readline()  # until rank 0 has published
        share.close()
        return
    members = _Members()
    with _Client(job.hub, Hello("learner", "learner", incarnation=1), handler=members.handle) as client:
        recorder = SpanRecorder(Path(job.spans), "learner")
        backend = "nccl" if trainer.device.type == "cuda" else "gloo"
        publisher = Publisher(client, config.weights, backend, recorder, others=share.others)
        members.publisher = publisher
        publisher.set_engines(members.engines or client.welcome.engines)
        outlet = PublishingOutlet(share, publisher, START_TIMEOUT_S)
        for version in range(job.rounds + 1):
            outlet.publish(trainer, WeightId(1, version))
            publisher.wait_published(version, START_TIMEOUT_S)
        times = publisher.take_times()
        assert [t.engines for t in times] == [job.engines] * (job.rounds + 1), times
        print(json.dumps([asdict(one) for one in times]), flush=True)
        publisher.close()
        recorder.close()


class _Client(BlockingClient):
    """Keeps from the hub what it would refuse: versions for which nothing was trained."""

    def call(self, message: Message, timeout_s: float, *, retry: bool = False) -> Message:
        return Ok() if isinstance(message, Published) else super().call(message, timeout_s, retry=retry)


class _Members:
    """Engines, as the hub tells of them."""

    def __init__(self) -> None:
        self.publisher: Publisher | None = None
        self.engines: tuple[EngineInfo, ...] = ()

    async def handle(self, message: Message) -> None:
        if isinstance(message, Membership):
            self.engines = message.engines
            if self.publisher is not None:
                self.publisher.set_engines(message.engines)


@contextmanager
def learner_ranks(job: Job, gpu: bool) -> Iterator[list[subprocess.Popen[str]]]:
    """One process per rank, on GPUs 0, 1, …"""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(job.ranks)}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.weight_sync_ranks", "--rank-job"]
    processes = []
    try:
        for rank in range(job.ranks):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank if gpu else 0)}
            processes.append(
                subprocess.Popen(
                    [*command, json.dumps(asdict(job))],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# ------------------------------------------------------------------------------------------------ the engines' side


class EngineActor:
    """One engine's connection to one hub."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name = name
        self._engine = engine
        self._client: HubClient | None = None

    async def join(self, address: str) -> None:
        engine = self._engine
        info = EngineInfo(engine.engine_id, self._name, engine.num_ranks, engine.takes_buffers)
        hello = Hello("actor", self._name, slots=1, engines=(info,), sources={"train": 100})
        self._client = await HubClient.connect(address, hello, handler=self._handle)

    async def _handle(self, message: Message) -> Message | None:
        if isinstance(message, Granted | Shutdown):
            return None  # generates nothing
        try:
            return await obey(message, self._engine)
        except (EngineError, WeightGroupError, TimeoutError) as failed:
            raise RemoteError(type(failed).__name__, str(failed)) from failed

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


async def published(job: Job, engines: Sequence[Engine], gpu: bool) -> list[dict[str, Any]]:
    """What every publication but the first took."""
    config = Config.model_validate({"hub": {"heartbeat_timeout_s": 30.0, "reconnect_s": 60.0}})
    async with AsyncExitStack() as stack:
        hub = Hub(config, "benchmark")
        await hub.start()
        running = asyncio.create_task(hub.run())
        for i, engine in enumerate(engines):
            actor = EngineActor(f"actor-{i}", engine)
            await actor.join(hub.address)
            stack.push_async_callback(actor.close)
        job = Job(**{**asdict(job), "hub": hub.address, "engines": len(engines)})
        with learner_ranks(job, gpu) as processes:
            assert processes[0].stdout is not None
            async with asyncio.timeout(2 * START_TIMEOUT_S):
                line = await asyncio.to_thread(processes[0].stdout.readline)
            if not line:
                raise RuntimeError(f"the learner of {job.ranks} ranks failed: its errors are above")
            for process in processes[1:]:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return list(json.loads(line))[1:]


async def start_engines(stack: AsyncExitStack, bench: Bench, count: int, tp: int) -> list[Engine]:
    """On the GPUs behind the learner's."""
    engines: list[Engine] = []
    for i in range(count):
        if bench.gpu:
            arguments = server_arguments(bench.checkpoint, CONTEXT, {**SUPPORTED_GPU_ARGUMENTS, "tp_size": tp})
            devices = tuple(range(bench.learner_gpus + i * tp, bench.learner_gpus + (i + 1) * tp))
            launch = LaunchSpec(arguments, bench.directory / f"sglang-{count}-{i}.log", devices=devices)
            engines.append(SGLangEngine(bench.checkpoint, engine_id=f"e{i}", launch=launch, max_context=CONTEXT))
        else:
            engines.append(EmbeddedEngine(bench.checkpoint, engine_id=f"e{i}", slots=1, max_context=CONTEXT))
        stack.push_async_callback(engines[-1].close)
    await asyncio.gather(*(engine.start() for engine in engines))
    return engines


# ---------------------------------------------------------------------------------------------------------- raw


def raw_job(role: dict[str, Any]) -> None:
    """A bare source, which sends to its groups in turn, or a bare receiver, which prints its seconds a round."""
    groups = [WeightGroup.create(WeightGroupSpec(**spec), role["rank"]) for spec in role["groups"]]
    device = torch.device("cuda", 0) if role["gpu"] else torch.device("cpu")
    if role["rank"] == 0:
        flat = torch.zeros(role["bytes"], dtype=torch.uint8, device=device)
        for _ in range(role["rounds"] + 1):
            for group in groups:
                group.send([("flat", flat)])
        sys.stdin.readline()
        return
    manifest = WeightManifest((TensorSpec("flat", "uint8", (role["bytes"],)),))
    times = []
    for _ in range(role["rounds"] + 1):
        begun = time.perf_counter()
        for group in groups:
            group.receive(manifest, device)
        times.append(time.perf_counter() - begun)
    print(json.dumps(times[1:]), flush=True)  # the first connects


def raw_s(bench: Bench, sources: int, receivers: int) -> list[float]:
    """Seconds of every round, of the slowest receiver; sources on the learner's GPUs, receivers on the engines'."""
    dealt = lanes(range(receivers), sources)
    backend = "nccl" if bench.gpu else "gloo"
    specs = [
        [
            WeightGroupSpec(
                f"raw-{s}.{n}", 1, "127.0.0.1", free_port(), 1 + len(lane), backend, bench.arguments.timeout_s
            )
            for n, lane in enumerate(dealt)
        ]
        for s in range(sources)
    ]
    roles = [
        (source, 0, [specs[source][lane] for lane in lanes_of_source(source, sources, len(dealt))])
        for source in range(sources)
    ]
    roles += [
        (bench.learner_gpus + engine, rank, [specs[source][number] for source in sources_of_lane(number, sources)])
        for number, lane in enumerate(dealt)
        for rank, engine in enumerate(lane, 1)
    ]
    common = {"bytes": bench.bytes // sources, "rounds": bench.arguments.rounds, "gpu": bench.gpu}
    processes = []
    try:
        for gpu, rank, groups in roles:
            role = {**common, "rank": rank, "groups": [asdict(spec) for spec in groups]}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.weight_sync_ranks", "--raw-job", json.dumps(role)],
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)} if bench.gpu else dict(os.environ),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        received = []
        for process in processes[sources:]:
            out, _ = process.communicate(timeout=START_TIMEOUT_S)
            received.append(json.loads(out))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [max(times) for times in zip(*received, strict=True)]


# ------------------------------------------------------------------------------------------------------ all of it


class Bench:
    """One shape on this machine."""

    def __init__(self, arguments: argparse.Namespace, shape: str, directory: Path) -> None:
        self.arguments, self.shape, self.directory = arguments, shape, directory
        self.gpu = arguments.device == "cuda"
        available = torch.cuda.device_count() // 2 if self.gpu else max(LAYOUTS)
        gpus = self.learner_gpus = max(n for n in LAYOUTS if n <= available)
        self.layouts = LAYOUTS[gpus]
        self.engine_layouts = [(gpus, 1), *([(gpus // 2, 2)] if gpus > 1 else [])] if self.gpu else [(2, 1)]
        self.checkpoint = directory / shape
        self.config = write_config(self.checkpoint, shape, arguments.device)
        self.bytes = sum(weight_sizes(self.config))
        write_random_weights(self.checkpoint, self.config, arguments.device)  # engines look up its shapes
        if self.gpu:
            torch.cuda.empty_cache()

    async def rows(self) -> list[dict[str, Any]]:
        rows = []
        for count, tp in self.engine_layouts:
            raw = {n: statistics.median(raw_s(self, n, count * tp)) for n in {1, self.learner_gpus}}
            say(f"{self.shape}: raw to {count} x TP{tp} measured")
            async with AsyncExitStack() as stack:
                engines = await start_engines(stack, self, count, tp)
                for layout in self.layouts:
                    for sources in sorted({1, layout.ranks}):
                        times = await published(self._job(layout, sources), engines, self.gpu)
                        rows.append(self._row(layout, f"{count} x TP{tp}", sources, times, raw[sources]))
                        say(f"{self.shape}, {layout.name} to {count} x TP{tp}, {sources} sources: measured")
        return rows

    def _job(self, layout: Layout, sources: int) -> Job:
        dtype = "bfloat16" if self.gpu else "float32"
        spans, a = str(self.directory / "spans.jsonl"), self.arguments
        return Job(
            "", str(self.checkpoint), layout.megatron, dtype, layout.ranks, sources, a.rounds, 0, a.timeout_s, spans
        )

    def _row(
        self, layout: Layout, engines: str, sources: int, times: list[dict[str, Any]], raw_s: float
    ) -> dict[str, Any]:
        broadcast_s = statistics.median(one["broadcast_s"] for one in times)
        return {
            "shape": self.shape,
            "learner": layout.name,
            "engines": engines,
            "sources": sources,
            "unique_gbps": self.bytes / broadcast_s / 1e9,
            "raw_gbps": self.bytes / raw_s / 1e9,
            "pause_to_resume_ms": 1e3 * statistics.median(one["pause_to_resume_s"] for one in times),
            "total_ms": 1e3 * statistics.median(one["total_s"] for one in times),
        }


def say(what: str) -> None:
    print(f"{time.monotonic() - BEGUN_S:6.1f} s  {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), help="[qwen3-4b qwen3-14b on GPUs, tiny on the CPU]"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--timeout-s", type=float, default=120.0, help="deadline of each phase of a publication")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--rank-job", help=argparse.SUPPRESS)
    parser.add_argument("--raw-job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_job:
        rank_job(Job(**json.loads(arguments.rank_job)))
        return
    if arguments.raw_job:
        raw_job(json.loads(arguments.raw_job))
        return
    gpu = arguments.device == "cuda"
    if gpu and torch.cuda.device_count() < 2:
        parser.error("needs 2, 4 or 8 GPUs, half of them for the learner; --device cpu is a rehearsal")
    rows = []
    for shape in arguments.shapes or (["qwen3-4b", "qwen3-14b"] if gpu else ["tiny"]):
        with tempfile.TemporaryDirectory() as directory:
            rows += asyncio.run(Bench(arguments, shape, Path(directory)).rows())
    report(arguments, rows)


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    out = arguments.out or (Path("benchmarks/results/weight_sync_ranks.json") if arguments.device == "cuda" else None)
    if out is not None:
        gpus = torch.cuda.device_count()
        machine = f"{gpus} × {torch.cuda.get_device_name(0)}" if gpus else f"{os.cpu_count()} CPU cores"
        text = {"rounds": arguments.rounds, "machine": machine, "torch": torch.__version__, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(text, indent=2) + "\n")


if __name__ == "__main__":
    main()
