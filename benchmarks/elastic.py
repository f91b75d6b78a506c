"""Actors that join and leave a running job: 1 → 4 → 2, then one that is preempted with notice and one without.

    python -m benchmarks.elastic [--steps 200] [--directory runs] [--out FILE]

The demo with checkpoints and a journal. A run begins with one actor; ``slime-async scale`` asks for four, later for
two; then one actor gets SIGTERM, and one SIGKILL. Each new actor is timed from the request until it has the weights,
and until its first trajectory is accepted, which is when its work first counts; most of that is Python and torch coming
up, so the same is told from joining the hub on. One that leaves is timed until its process is gone, with all it had
begun delivered; one that is replaced, from the signal until its successor's first trajectory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chaos.run import demo_config
from slime_async.audit import AuditReport, audit
from slime_async.cli.audit import has_finished
from slime_async.cli.prepare import prepare_model
from slime_async.cli.roles import plan_run
from slime_async.cli.run_directory import JOURNAL, make_run_directory, write_config
from slime_async.cli.scale import ask
from slime_async.cli.train import train
from slime_async.config import Config
from slime_async.telemetry.environment import package_version, usable_cpus
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.metrics import read_metrics
from slime_async.telemetry.spans import read_tracks
from slime_async.telemetry.summary import Summary, summarise
from slime_async.transport.journal import read_trail

ROOT = Path(__file__).parents[1]
POLL_S = 0.1
MOST, FINALLY = 4, 2


@dataclass(slots=True)
class Requests:
    """When what was asked for, in Unix time."""

    grow_s: float = 0.0
    shrink_s: float = 0.0
    notice: str = ""
    """Who got SIGTERM"""
    notice_s: float = 0.0
    killed: str = ""
    """Who got SIGKILL"""
    killed_s: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "elastic.json")
    parsed = parser.parse_args(arguments)
    config = demo_config(
        {
            "run.name": "elastic",
            "run.directory": str(parsed.directory),
            "run.steps": str(parsed.steps),
            "checkpoint.interval-steps": "20",
            "actor.count": "1",
            "hub.heartbeat-timeout-s": "5",
        }
    )
    directory = make_run_directory(config, datetime.now())
    config = prepare_model(config, directory)
    write_config(config, directory)
    requests = Requests()

    async def watch(_config: Config, _directory: Path, _address: str) -> None:
        await play(directory, parsed.steps, requests)
        await asyncio.Event().wait()

    code = train(config, directory, plan_run(config, directory), watch)
    report = audit(
        read_trail(directory / JOURNAL), list(read_metrics(directory / "metrics.jsonl")), has_finished(directory)
    )
    found = result(directory, requests, report, summarise(directory), parsed)
    for name, value in found["figures"].items():
        print(f"{name:44}{value}")
    for line in report.lines():
        print(line)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if code == 0 and report.clean else 1


async def play(run: Path, steps: int, requests: Requests) -> None:
    """Ask, wait for what was asked to happen, let the run go on for a while, and ask again."""
    await until(lambda: rl_steps(run) >= steps * 0.1)
    requests.grow_s = time.time()
    ask(run, MOST)
    await until(lambda: all(first_delivery_s(run, f"actor-{n}") is not None for n in range(MOST)))
    await until(lambda: rl_steps(run) >= steps * 0.35)
    requests.shrink_s = time.time()
    ask(run, FINALLY)
    await until(lambda: len(events(run, "role_left")) == MOST - FINALLY)
    await until(lambda: rl_steps(run) >= steps * 0.55)
    requests.notice, requests.notice_s = await strike(run, "actor-0", signal.SIGTERM)
    await until(lambda: first_delivery_s(run, "actor-0.1") is not None)
    await until(lambda: rl_steps(run) >= steps * 0.7)
    requests.killed, requests.killed_s = await strike(run, "actor-1", signal.SIGKILL)


async def strike(run: Path, name: str, number: signal.Signals) -> tuple[str, float]:
    """Signal the process of an actor."""
    [pid] = [pid for pid in pids(run) if f"--name\0{name}\0" in (Path("/proc") / str(pid) / "cmdline").read_text()]
    os.kill(pid, number)
    return name, time.time()


def pids(run: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if str(run) in command and "\0actor\0" in command:
                found.append(int(entry.name))
    return found


async def until(ready: Any) -> None:
    """The run's own end is the deadline: with it, this is cancelled."""
    while not ready():
        await asyncio.sleep(POLL_S)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(run / "events.jsonl") if event["event"] == name]


def rl_steps(run: Path) -> int:
    return sum(line.get("phase") == "rl" for line in read_jsonl(run / "metrics.jsonl"))


def first_span_s(run: Path, actor: str, name: str) -> float | None:
    """When a span of this kind first ended on an actor, in Unix time; None if none has."""
    for track in read_tracks(run / "spans", lambda _: None):
        if track.process == actor:
            ends = [span.end_ns for span in track.spans if span.name == name]
            return min(ends) / 1e9 if ends else None
    return None


def first_delivery_s(run: Path, actor: str) -> float | None:
    return first_span_s(run, actor, "deliver")


def joined_s(run: Path, actor: str) -> float:
    """When the hub welcomed it, from the hub's log."""
    log = (run / "logs" / "hub.log").read_text()
    found = re.search(rf"^(\S+ \S+),(\d+) hub INFO \S+ actor {re.escape(actor)} joined ", log, re.MULTILINE)
    assert found, f"{actor} never joined"
    return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(found[2]) / 1000


def result(
    run: Path, requests: Requests, report: AuditReport, summary: Summary, parsed: argparse.Namespace
) -> dict[str, Any]:
    new = [f"actor-{n}" for n in range(1, MOST)]
    weights = [at - requests.grow_s for name in new if (at := first_span_s(run, name, "starting")) is not None]
    counts = [at - requests.grow_s for name in new if (at := first_delivery_s(run, name)) is not None]
    after_joining = [at - joined_s(run, name) for name in new if (at := first_delivery_s(run, name)) is not None]
    left = [event["time_s"] - requests.shrink_s for event in events(run, "role_left")]
    replaced = [
        at - since
        for name, since in ((requests.notice, requests.notice_s), (requests.killed, requests.killed_s))
        if name and (at := first_delivery_s(run, f"{name}.1")) is not None
    ]
    return {
        "command": f"python -m benchmarks.elastic --steps {parsed.steps}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {usable_cpus()} CPU cores for all roles, Python {platform.python_version()}",
        "versions": {name: package_version(name) for name in ("torch", "megatron-core", "pyzmq")},
        "figures": {
            "has_weights_s": weights,
            "first_trajectory_after_joining_s": after_joining,
            "first_trajectory_counts_s": counts,
            "left_after_drain_s": left,
            "replaced_after_notice_or_kill_s": replaced,
            "audit_clean": report.clean,
            "accuracy_before": summary.accuracy_before,
            "accuracy_after": summary.accuracy_after,
            "steps": summary.steps,
            "wall_s": summary.wall_s,
        },
        "audit": list(report.lines()),
    }


if __name__ == "__main__":
    sys.exit(main())
