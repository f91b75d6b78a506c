"""What it gains that requests enter an SGLang server in bunches: tokens per second of a server that is kept full.

    python -m benchmarks.prefill_bunches                 a GPU: Qwen3-0.6B's shape, 384 requests at once
    python -m benchmarks.prefill_bunches --device cpu    SGLang's CPU path, a tiny model, 64 requests
    options: --fractions 0 0.03125 0.0625 0.125 0.25  --seconds 12  --running N  --asked N  --shape qwen3-4b  --out FILE

One server, one process that asks; as an answer ends, the next request comes. Lengths are log-normal, those of
``examples/bench/heavy_tailed_2gpus.toml``. Fractions take turns, each twice, the second time in the reverse order; what
is measured is written after each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import re
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.weight_sync_models import SUPPORTED_GPU_ARGUMENTS
from slime_async.actors.engine import GenerateRequest, SamplingParams
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.engine import SGLangEngine
from slime_async.actors.sglang.server import LaunchSpec, ServerProcess
from slime_async.actors.sglang.versions import installed_version
from slime_async.bench.random_model import qwen3_0_6b, qwen3_4b, qwen3_14b
from slime_async.demo.model import make_checkpoint
from slime_async.trajectory import WeightId

SHAPES = {"tiny": make_checkpoint, "qwen3-0.6b": qwen3_0_6b, "qwen3-4b": qwen3_4b, "qwen3-14b": qwen3_14b}
FRACTIONS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
MEDIAN, SIGMA, LONGEST, PROMPT = 96, 0.9, 1024, 16
START_TIMEOUT_S = 300.0
SETTLE_FRACTION = 0.5
"""Of a measurement's seconds, before it: until answers of all lengths are under way"""
WAIT_S = 1.0
WEIGHTS = WeightId(0, 0)


@dataclass(frozen=True, slots=True)
class Row:
    """One fraction, means over its measurements."""

    fraction: float
    tokens_per_s: float
    answers_per_s: float
    running: float
    """Requests in the server"""
    token_ms: float
    """From an answer's entering to its end, over its tokens"""
    prefills_per_answer: float


def arguments_of(parsed: argparse.Namespace) -> dict[str, Any]:
    if parsed.device == "cuda":
        sizes = [1, 2, 4, 8, *range(16, parsed.running + 1, 16)]
        return {
            **SUPPORTED_GPU_ARGUMENTS,
            "max_running_requests": parsed.running,
            "cuda_graph_bs_decode": sizes,
            "stream_interval": 32,
        }
    return {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "skip_server_warmup": True,
        "max_total_tokens": 1 << 16,
        "max_running_requests": parsed.running,
        "stream_interval": 32,
    }


class Load:
    """Asks an engine for ``asked`` answers at a time."""

    def __init__(self, engine: SGLangEngine, asked: int, longest: int, seed: int) -> None:
        self._engine = engine
        self._asked = asked
        self._longest = longest
        self._random = random.Random(seed)
        self.ended: list[tuple[float, float, int]] = []
        """(when, seconds, tokens) of each answer"""

    async def play(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._asked):
                tasks.create_task(self._ask())

    async def _ask(self) -> None:
        while True:
            length = round(min(self._longest, max(2.0, self._random.lognormvariate(math.log(MEDIAN), SIGMA))))
            prompt = [self._random.randrange(10) for _ in range(PROMPT)]
            sampling = SamplingParams(length)
            begun = time.monotonic()
            answer = await self._engine.generate(GenerateRequest(uuid.uuid4().hex, prompt, sampling))
            self.ended.append((time.monotonic(), time.monotonic() - begun, len(answer.output_ids)))


async def measure(url: str, checkpoint: Path, log: Path, fraction: float, parsed: argparse.Namespace) -> Row:
    engine = SGLangEngine(
        checkpoint,
        engine_id="bench",
        url=url,
        weights=WEIGHTS,
        max_context=parsed.context,
        prefill_fraction=fraction,
        prefill_wait_s=WAIT_S,
    )
    await engine.start()
    load = Load(engine, parsed.asked, parsed.context - PROMPT, parsed.seed)
    playing = asyncio.create_task(load.play())
    try:
        await hold(playing, parsed.seconds * SETTLE_FRACTION)
        load.ended.clear()
        before, prefills, begun = (await engine.status()).generated_tokens, prefills_in(log), time.monotonic()
        running = []
        while time.monotonic() - begun < parsed.seconds:
            await hold(playing, parsed.seconds / 40)
            running.append((await engine.status()).running_requests)
        seconds = time.monotonic() - begun
        tokens = (await engine.status()).generated_tokens - before
        answers = list(load.ended)
        return Row(
            fraction,
            tokens / seconds,
            len(answers) / seconds,
            statistics.mean(running),
            1000 * sum(taken for _, taken, _ in answers) / sum(count for *_, count in answers),
            (prefills_in(log) - prefills) / len(answers),
        )
    finally:
        playing.cancel()
        await asyncio.wait([playing])
        await engine.close()


async def hold(playing: asyncio.Task[None], seconds: float) -> None:
    """Let it go on; raises what ended it."""
    done, _ = await asyncio.wait([playing], timeout=seconds)
    if done:
        playing.result()


def prefills_in(log: Path) -> int:
    return len(re.findall(r"Prefill batch", log.read_text(errors="replace")))


async def run(parsed: argparse.Namespace, directory: Path, write: Callable[[list[Row]], None]) -> list[Row]:
    checkpoint = directory / "checkpoint"
    SHAPES[parsed.shape](checkpoint, 0)
    log = directory / "sglang.log"
    arguments = server_arguments(checkpoint, parsed.context, arguments_of(parsed), WEIGHTS)
    server = await ServerProcess.launch(LaunchSpec(arguments, log, devices=(0,) if parsed.device == "cuda" else ()))
    rows: dict[float, list[Row]] = {fraction: [] for fraction in parsed.fractions}
    try:
        first = SGLangEngine(checkpoint, engine_id="first", url=server.url, weights=WEIGHTS, max_context=parsed.context)
        async with asyncio.timeout(START_TIMEOUT_S):
            await first.start()
            await first.generate(GenerateRequest("warm", [1] * PROMPT, SamplingParams(8)))
        await first.close()
        for fraction in (*parsed.fractions, *reversed(parsed.fractions)):
            async with asyncio.timeout(6 * parsed.seconds + 60):
                rows[fraction].append(await measure(server.url, checkpoint, log, fraction, parsed))
            print(f"{fraction:.5f}: {rows[fraction][-1].tokens_per_s:,.0f} tokens/s", flush=True)
            means = [mean_of(some) for some in rows.values() if some]
            write(means)
    finally:
        await server.kill()
    return means


def mean_of(rows: Sequence[Row]) -> Row:
    plain = [asdict(row) for row in rows]
    return Row(**{name: statistics.mean(row[name] for row in plain) for name in plain[0]})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), help="[qwen3-0.6b on a GPU, tiny on the CPU]")
    parser.add_argument("--fractions", type=float, nargs="+", default=list(FRACTIONS))
    parser.add_argument("--seconds", type=float, default=12.0, help="of one measurement; each fraction has two")
    parser.add_argument("--running", type=int, help="that the server decodes at once [384 on a GPU, 64 on the CPU]")
    parser.add_argument("--asked", type=int, help="answers that are asked for at once [as many as the server decodes]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the JSON goes [nowhere]")
    parsed = parser.parse_args(arguments)
    gpu = parsed.device == "cuda"
    parsed.shape = parsed.shape or ("qwen3-0.6b" if gpu else "tiny")
    parsed.running = parsed.running or (384 if gpu else 64)
    parsed.asked = parsed.asked or parsed.running
    parsed.context = LONGEST + PROMPT if gpu else 256

    def write(rows: list[Row]) -> None:
        if parsed.out is not None:
            parsed.out.write_text(json.dumps(result(parsed, rows, gpu), indent=2) + "\n")

    with tempfile.TemporaryDirectory() as directory:
        rows = asyncio.run(run(parsed, Path(directory), write))
    print("| fraction | tokens/s | × the first | answers/s | running | ms a token | prefills an answer |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row.fraction:.4g} | {row.tokens_per_s:,.0f} | {row.tokens_per_s / rows[0].tokens_per_s:.2f} "
            f"| {row.answers_per_s:.1f} | {row.running:.0f} | {row.token_ms:.1f} | {row.prefills_per_answer:.2f} |"
        )
    return 0


def result(parsed: argparse.Namespace, rows: Sequence[Row], gpu: bool) -> dict[str, Any]:
    best = max(rows, key=lambda row: row.tokens_per_s)
    return {
        "command": "python -m benchmarks.prefill_bunches" + ("" if gpu else " --device cpu"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name(0) if gpu else f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"sglang": installed_version(), "torch": torch.__version__},
        "shape": parsed.shape,
        "running": parsed.running,
        "asked": parsed.asked,
        "seconds": parsed.seconds,
        "figures": {
            "best_over_first": best.tokens_per_s / rows[0].tokens_per_s,
            "best_fraction": best.fraction,
        },
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    raise SystemExit(main())
