"""One of several engines is killed in the middle of a run: how long until throughput is what it was.

    python -m benchmarks.engine_killed                 GPUs: the learner on a quarter, an SGLang server on each other
    python -m benchmarks.engine_killed --device cpu    a rehearsal: two actors with embedded engines, one of them dies
    options: --warmup-s 60  --after-s 180  --window-s 10  --directory DIR  --out FILE

The heavy-tailed workload of ``slime-async bench``, asynchronous with η = 2. On GPUs it is a server that is killed, and
its actor starts another; on the CPU, where engines are part of actors, the actor. Throughput is trajectories delivered,
in windows of ``--window-s``; it is full again when a window has 95% of the median window before the kill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.elastic import pids, rl_steps
from slime_async.actors.sglang.versions import installed_version
from slime_async.audit import audit
from slime_async.cli.audit import has_finished
from slime_async.cli.prepare import prepare_model
from slime_async.cli.roles import plan_run
from slime_async.cli.run_directory import JOURNAL, make_run_directory, write_config
from slime_async.cli.train import train
from slime_async.config import Config, load_config
from slime_async.telemetry.metrics import read_metrics
from slime_async.telemetry.spans import read_spans
from slime_async.transport.journal import read_trail

EXAMPLES = Path(__file__).parents[1] / "examples" / "bench"
FULL = 0.95
"""Of the throughput before"""
START_TIMEOUT_S = 600.0
"""For servers, and for the first batch"""
MOVE = 0.1
"""By which share of itself a window moves on"""


def config_of(gpus: int, directory: Path, seconds: float) -> Config:
    """0 GPUs: the CPU."""
    settings: dict[tuple[str, str], Any] = {
        ("run", "name"): "engine-killed",
        ("run", "directory"): str(directory),
        ("run", "steps"): 1_000_000,
        ("run", "time_limit_s"): seconds,
        ("staleness", "max_staleness"): 2,
        ("checkpoint", "interval_steps"): 20,
        ("actor", "max_restarts"): 3,
    }
    if not gpus:
        return load_config(EXAMPLES / "heavy_tailed.toml", {**settings, ("actor", "count"): 2})
    learners = max(1, gpus // 4)
    settings |= {
        ("learner", "ranks"): learners,
        ("actor", "count"): gpus - learners,
        ("actor", "devices"): list(range(learners, gpus)),
        ("batch", "groups"): 16 * gpus,
    }
    return load_config(EXAMPLES / "heavy_tailed_2gpus.toml", settings)


async def kill_one(run: Path, gpu: bool, warmup_s: float) -> float:
    """After ``warmup_s`` of training; when, in Unix time. Raises ``TimeoutError`` when training does not begin."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while rl_steps(run) < 1:
            await asyncio.sleep(0.1)
    await asyncio.sleep(warmup_s)
    actor = min(pids(run))
    if gpu:
        os.killpg(server_of(actor), signal.SIGKILL)  # it leads a group of its own
    else:
        os.kill(actor, signal.SIGKILL)
    return time.time()


def server_of(actor: int) -> int:
    """The process of an actor's SGLang server. Raises ``LookupError`` where it has none."""
    for task in (Path("/proc") / str(actor) / "task").iterdir():
        for child in (task / "children").read_text().split():
            if "sglang" in (Path("/proc") / child / "cmdline").read_text():
                return int(child)
    raise LookupError(f"actor {actor} has no server")


def deliveries_s(run: Path) -> list[float]:
    """When trajectories were with the hub, in Unix time, ascending."""
    return sorted(span.end_ns / 1e9 for span in read_spans(run / "spans") if span.name == "deliver")


def rate(times: Sequence[float], start: float, window_s: float) -> float:
    return sum(start <= at < start + window_s for at in times) / window_s


def figures(times: Sequence[float], killed_s: float, warmup_s: float, window_s: float) -> dict[str, float | None]:
    """``seconds_to_full_throughput`` is to the end of the first full window that began after the kill."""
    before = [rate(times, killed_s - (n + 1) * window_s, window_s) for n in range(max(1, int(warmup_s / 2 / window_s)))]
    usual = statistics.median(before)
    starts = [killed_s + n * MOVE * window_s for n in range(int((times[-1] - killed_s - window_s) / (MOVE * window_s)))]
    after = [(start, rate(times, start, window_s)) for start in starts]
    # a window that is full though the engine is not back would be chance: the worst one comes first
    worst = min(after, key=lambda one: one[1], default=(killed_s, 0.0))
    full = next((start for start, found in after if start >= worst[0] and found >= FULL * usual), None)
    return {
        "trajectories_per_s_before": usual,
        "trajectories_per_s_worst": worst[1],
        "seconds_to_full_throughput": None if full is None else full + window_s - killed_s,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--warmup-s", type=float, default=60.0)
    parser.add_argument("--after-s", type=float, default=180.0)
    parser.add_argument("--window-s", type=float, default=10.0)
    parser.add_argument("--directory", type=Path, help="where the run is kept [nowhere]")
    parser.add_argument("--out", type=Path, help="where the JSON goes [benchmarks/results/engine_killed.json on GPUs]")
    parsed = parser.parse_args(arguments)
    gpus = torch.cuda.device_count() if parsed.device == "cuda" else 0
    if parsed.device == "cuda" and gpus < 3:
        parser.error(f"needs three GPUs or more, this machine has {gpus}; --device cpu is a rehearsal")
    killed: list[float] = []

    async def watch(_config: Config, directory: Path, _address: str) -> None:
        killed.append(await kill_one(directory, gpus > 0, parsed.warmup_s))
        await asyncio.Event().wait()

    with tempfile.TemporaryDirectory() as scratch:
        config = config_of(gpus, parsed.directory or Path(scratch), parsed.warmup_s + parsed.after_s)
        directory = make_run_directory(config, datetime.now())
        config = prepare_model(config, directory)
        write_config(config, directory)
        code = train(config, directory, plan_run(config, directory), watch)
        steps = list(read_metrics(directory / "metrics.jsonl"))
        report = audit(read_trail(directory / JOURNAL), steps, has_finished(directory))
        if not killed:
            raise SystemExit(f"the run ended (exit code {code}) before an engine was killed: raise --after-s")
        found = figures(deliveries_s(directory), killed[0], parsed.warmup_s, parsed.window_s)
    for name, value in found.items():
        print(f"{name:32}{value if value is None else round(value, 1)}")
    print(*report.lines(), sep="\n")
    out = parsed.out or (Path("benchmarks/results/engine_killed.json") if gpus else None)
    if out is not None:
        machine = f"{gpus} × {torch.cuda.get_device_name(0)}" if gpus else f"{os.cpu_count()} CPU cores"
        result = {
            "command": f"python -m benchmarks.engine_killed --window-s {parsed.window_s:g}",
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{machine}, {platform.machine()}",
            "versions": {"torch": torch.__version__, "sglang": installed_version()},
            "figures": found,
            "audit": list(report.lines()),
        }
        out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if code == 0 and report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
