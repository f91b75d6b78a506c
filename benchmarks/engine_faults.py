"""An SGLang server that dies or hangs around a broadcast, and a learner that dies in one: how long until all is well.

    python -m benchmarks.engine_faults            two GPUs: learner on the first, SGLang on the second, NCCL
    python -m benchmarks.engine_faults --device cpu   SGLang's CPU path, gloo (see scripts/test-sglang)
    options: --steps 24  --out benchmarks/results/engine_faults.json

A short run of examples/gpu.toml. Its lone server is killed while it receives, stopped while it receives, killed just
before and just after; then the learner is killed ten tensors into a broadcast. Each time: seconds until the engine that
is there then uses the learner's weights. The run has to finish, and its audit has to be clean.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.run import Outcome, run_under_fire
from benchmarks.chaos.servers import FILE
from slime_async.actors.sglang.versions import installed_version
from slime_async.config import load_config
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.spans import read_spans

ROOT = Path(__file__).parents[1]
AIMS = {"actor": (("server_faults", 3),), "learner": (("halting_learner", 18),)}
"""The server's faults come with every third weights that it receives; by the 18th broadcast they are over"""
SETTINGS: dict[tuple[str, str], Any] = {
    ("run", "name"): "engine-faults",
    ("batch", "groups"): 4,
    ("batch", "group_size"): 4,
    ("warm_start", "steps"): 30,
    ("evaluation", "before"): False,
    ("evaluation", "after"): False,
    ("checkpoint", "interval_steps"): 5,
    ("learner", "max_restarts"): 3,
    ("actor", "max_restarts"): 12,
    ("weights", "timeout_s"): 15,
}
CPU: dict[tuple[str, str], Any] = {
    ("model", "path"): "slime_async.demo.model:make_checkpoint",
    ("model", "dtype"): "float32",
    ("actor", "devices"): [],
    ("actor", "slots"): 16,
    ("weights", "backend"): "gloo",
    ("sglang", "device"): "cpu",
    ("sglang", "dtype"): "float32",
    ("sglang", "attention_backend"): "torch_native",
    ("sglang", "skip_server_warmup"): True,
    ("sglang", "sleep_on_idle"): True,
    ("sglang", "max_total_tokens"): 16384,
    ("sglang", "max_running_requests"): 16,
}


def recoveries(outcome: Outcome) -> dict[str, float]:
    """Seconds from each fault until a publication after it was complete; -1 where none was."""
    spans = read_spans(outcome.directory / "spans")
    published = sorted(span.end_ns / 1e9 for span in spans if span.name == "publish")
    return {
        str(line["fault"]): next((end - line["time_s"] for end in published if end > line["time_s"]), -1.0)
        for line in read_jsonl(outcome.directory / FILE)
    }


def result(outcome: Outcome, steps: int, gpu: bool) -> dict[str, Any]:
    seconds = recoveries(outcome)
    return {
        "command": f"python -m benchmarks.engine_faults --steps {steps}" + ("" if gpu else " --device cpu"),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"2 × {torch.cuda.get_device_name(0)}" if gpu else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "sglang": installed_version()},
        "figures": {
            **{f"{fault.replace(' ', '_')}_s": taken for fault, taken in seconds.items()},
            "recovered": float(sum(taken >= 0 for taken in seconds.values())),
            "finished": float(outcome.exit_code == 0),
            "steps": float(outcome.summary.steps),
            "actor_deaths": float(outcome.summary.actor_deaths),
        },
        "audit": outcome.audit.lines(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, help="[benchmarks/results/engine_faults.json on GPUs]")
    parsed = parser.parse_args()
    gpu = parsed.device == "cuda"
    settings = {**SETTINGS, ("run", "steps"): parsed.steps, **({} if gpu else CPU)}
    outcome = run_under_fire(load_config(ROOT / "examples" / "gpu.toml", settings), AIMS, 0.0, 0, 0)
    report = result(outcome, parsed.steps, gpu)
    print("| figure | value |\n| --- | --- |")
    for name, value in report["figures"].items():
        print(f"| {name} | {value:.4g} |")
    for line in report["audit"]:
        print(line)
    out = parsed.out or (ROOT / "benchmarks" / "results" / "engine_faults.json" if gpu else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if outcome.exit_code == 0 and outcome.audit.clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
