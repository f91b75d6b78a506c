"""Servers that die, hang, refuse or are late at a broadcast, a learner that dies in one: how long until all is well.

    python -m benchmarks.engine_faults                two GPUs: learners on the first, SGLang on the second, NCCL
    python -m benchmarks.engine_faults --device cpu   SGLang's CPU path, gloo (see scripts/test-sglang), one by one
    options: --faults "killed during" late …  --steps 8  --at-once 7  --deadline-s 420  --directory DIR  --out FILE

Each fault has a short run of examples/gpu.toml of its own, all of them side by side on GPUs: its lone server gets into
trouble when it receives weights for the third time, or its learner is killed three buffers into the third broadcast.
What is measured is the time from there until an engine uses the learner's weights again. The run has to finish, and its
audit has to be clean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.run import Aims, Outcome, run_under_fire
from benchmarks.chaos.servers import FILE, LEARNER_FAULT, SERVER_FAULTS, point_of
from slime_async.actors.sglang.versions import installed_version
from slime_async.config import load_config
from slime_async.guard import guarded
from slime_async.logs import log_tail
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.spans import read_spans

ROOT = Path(__file__).parents[1]
FAULTS = (*SERVER_FAULTS, LEARNER_FAULT)
PASSAGE = 3
"""The fault comes with this broadcast"""
SETTINGS: dict[tuple[str, str], Any] = {
    ("run", "name"): "engine-faults",
    ("batch", "groups"): 4,
    ("batch", "group_size"): 4,
    ("warm_start", "steps"): 0,
    ("evaluation", "before"): False,
    ("evaluation", "after"): False,
    ("checkpoint", "interval_steps"): 2,
    ("learner", "max_restarts"): 3,
    ("actor", "max_restarts"): 3,
    ("sglang", "mem_fraction_static"): 0.5,
    ("sglang", "max_total_tokens"): 16384,
    ("weights", "timeout_s"): 15,
    ("weights", "buffer_bytes"): 32 << 20,
}
CPU: dict[tuple[str, str], Any] = {
    ("model", "path"): "slime_async.demo.model:make_checkpoint",
    ("model", "dtype"): "float32",
    ("actor", "devices"): [],
    ("actor", "slots"): 16,
    ("weights", "backend"): "gloo",
    ("weights", "buffer_bytes"): 64 << 10,
    ("sglang", "device"): "cpu",
    ("sglang", "dtype"): "float32",
    ("sglang", "attention_backend"): "torch_native",
    ("sglang", "skip_server_warmup"): True,
    ("sglang", "sleep_on_idle"): True,
    ("sglang", "max_running_requests"): 16,
}


def aims(fault: str) -> Aims:
    """Of the first lives; the learner halts in every broadcast, so that there is time to die in it."""
    if fault == LEARNER_FAULT:
        return {"learner": (("halting_learner", PASSAGE),)}
    return {"actor": ((point_of(fault), PASSAGE),), "learner": (("halting_learner", 0),)}


def run_one(fault: str, gpu: bool, steps: int, directory: Path) -> dict[str, Any]:
    """One run, in this process, and what came of it."""
    settings = {**SETTINGS, ("run", "steps"): steps, ("run", "directory"): str(directory), **({} if gpu else CPU)}
    outcome = run_under_fire(load_config(ROOT / "examples" / "gpu.toml", settings), aims(fault), 0.0, 0, 0)
    return {
        "recovered_s": recovered_s(outcome),
        "finished": outcome.exit_code == 0,
        "steps": outcome.summary.steps,
        "actor_deaths": outcome.summary.actor_deaths,
        "audit_clean": outcome.audit.clean,
        "audit": list(outcome.audit.lines()),
    }


def recovered_s(outcome: Outcome) -> float | None:
    """Seconds from the fault until a publication after it was complete."""
    published = sorted(span.end_ns / 1e9 for span in read_spans(outcome.directory / "spans") if span.name == "publish")
    hits = [float(line["time_s"]) for line in read_jsonl(outcome.directory / FILE)]
    return next((end - hit for hit in hits for end in published if end > hit), None)


class Child:
    """``run_one`` in a process of its own, whose words are in a file."""

    def __init__(self, fault: str, parsed: argparse.Namespace) -> None:
        directory: Path = parsed.directory / fault.replace(" ", "-")
        directory.mkdir(parents=True, exist_ok=True)
        self._result, self._log = directory / "result.json", directory / "output.log"
        self._command = [sys.executable, "-m", "benchmarks.engine_faults", "--device", parsed.device]
        self._command += ["--steps", str(parsed.steps), "--directory", str(directory), "--one", fault]

    def run(self, deadline: float) -> dict[str, Any]:
        """To its end, or to ``deadline`` on the monotonic clock."""
        self._result.unlink(missing_ok=True)
        with self._log.open("w") as log:
            process = subprocess.Popen(
                guarded(self._command), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.write("no end within the deadline\n")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not self._result.exists():
            return {"recovered_s": None, "finished": False, "audit_clean": False, "output": log_tail(self._log, 30)}
        result: dict[str, Any] = json.loads(self._result.read_text())
        return result


def result(outcomes: dict[str, dict[str, Any]], parsed: argparse.Namespace) -> dict[str, Any]:
    gpu = parsed.device == "cuda"
    return {
        "command": f"python -m benchmarks.engine_faults --steps {parsed.steps}" + ("" if gpu else " --device cpu"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"2 × {torch.cuda.get_device_name(0)}" if gpu else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "sglang": installed_version()},
        "figures": {
            **{f"{fault.replace(' ', '_')}_s": outcome["recovered_s"] for fault, outcome in outcomes.items()},
            "faults": len(outcomes),
            "recovered": sum(outcome["recovered_s"] is not None for outcome in outcomes.values()),
            "finished": sum(outcome["finished"] for outcome in outcomes.values()),
            "audits_clean": sum(outcome["audit_clean"] for outcome in outcomes.values()),
        },
        "runs": outcomes,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--at-once", type=int, help="runs side by side [all on GPUs, 1 on the CPU]")
    parser.add_argument("--deadline-s", type=float, default=420.0, help="of all together; 420 are for GPUs")
    parser.add_argument("--directory", type=Path, default=Path("runs") / "engine-faults", help="[runs/engine-faults]")
    parser.add_argument("--out", type=Path, help="[benchmarks/results/engine_faults.json on GPUs]")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    gpu = parsed.device == "cuda"
    if parsed.one:
        (parsed.directory / "result.json").write_text(
            json.dumps(run_one(parsed.one, gpu, parsed.steps, parsed.directory.resolve()))
        )
        return 0
    deadline = time.monotonic() + parsed.deadline_s
    children = [Child(fault, parsed) for fault in parsed.faults]
    with ThreadPoolExecutor(parsed.at_once or (len(children) if gpu else 1)) as pool:
        outcomes = dict(zip(parsed.faults, pool.map(lambda child: child.run(deadline), children), strict=True))
    report = result(outcomes, parsed)
    print("| fault | recovered after, s | run finished | audit |\n| --- | --- | --- | --- |")
    for fault, outcome in outcomes.items():
        after = "–" if outcome["recovered_s"] is None else f"{outcome['recovered_s']:.1f}"
        audit = "clean" if outcome["audit_clean"] else "not clean"
        print(f"| {fault} | {after} | {'yes' if outcome['finished'] else 'no'} | {audit} |")
    for fault, outcome in outcomes.items():
        if "output" in outcome:
            print(f"\n{fault}:\n{outcome['output']}")
    out = parsed.out or (ROOT / "benchmarks" / "results" / "engine_faults.json" if gpu else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(outcome["finished"] and outcome["audit_clean"] for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
