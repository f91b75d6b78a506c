"""``python -m benchmarks.learner``: tokens/s, MFU and memory of whole training steps on one GPU.

::

    checks ─► cell ─► cell ─► …          one process each, under a deadline; the next one's imports run meanwhile
       each writes its row ─► results/learner.json, after every cell

A step is 64k tokens of PPO, from host arrays to updated weights, optimizer and clipping included. MFU is
``(6·N + 6·L·heads·head_dim·s) · tokens / seconds / 989e12``: N all parameters, s the sequence's length (its mean
weighted by tokens), nothing counted for what is recomputed, dense bf16 peak of H100 SXM and H200. transformers trains
the same tokens with the same objective, in bf16 with torch's fused AdamW on bf16 weights, in its best microbatch.

``--device cpu --shapes tiny`` rehearses everything in small: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.learner.cells import Cell, plan
from benchmarks.learner.report import HEAD, check_line, figures, row_line

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "flash-attn")
CPU_TOKENS = 2048


class Worker:
    """A process that has imported what it needs and waits to begin."""

    def __init__(self, task: dict[str, Any], directory: Path, environment: dict[str, str]) -> None:
        self._out = Path(tempfile.mkdtemp(dir=directory)) / "result.json"
        self._errors = self._out.with_name("errors.txt").open("w+")
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learner.worker", json.dumps(task), str(self._out)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def run(self, timeout_s: float) -> dict[str, Any]:
        """Let it begin; its result (as far as it came), or what became of it."""
        begun, failed = time.monotonic(), None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            failed = f"no end within {timeout_s:.0f} s"
        except BrokenPipeError:
            failed = "died before it began"
        if failed is None and self._process.returncode != 0:
            failed = self._last_words()
        self.close()
        result = json.loads(self._out.read_text()) if self._out.exists() else {}
        return result | ({"failed": failed} if failed else {}) | {"wall_s": time.monotonic() - begun}

    def close(self) -> None:
        """End it and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-1500:]


def gpu() -> tuple[str, float]:
    """Name and memory (GB) of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    name, mebibytes = (
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")[0].split(",")
    )
    return name.strip(), float(mebibytes) * 1.048576e-3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4b", "1.7b", "0.6b"], help="4b 1.7b 0.6b, or tiny alone")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=65_536, help="per step")
    parser.add_argument("--steps", type=int, default=2, help="timed ones per cell")
    parser.add_argument("--budget-s", type=float, default=1500.0, help="no cell begins that could not end within this")
    parser.add_argument("--cell-s", type=float, default=120.0, help="deadline of one cell")
    parser.add_argument("--only", nargs="+", default=[""], help="cells whose name contains one of these")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "learner.json")
    parsed = parser.parse_args(arguments)
    if parsed.device == "cpu":
        name, memory_gb, parsed.tokens = f"{os.cpu_count()} CPU cores", 0.0, min(parsed.tokens, CPU_TOKENS)
    else:
        name, memory_gb = gpu()
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.learner", *(arguments or sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{name}, {memory_gb:.0f} GB, {platform.machine()}",
        "versions": {"python": platform.python_version()} | _versions(),
        "figures": {},
        "checks": [],
        "cells": [],
    }
    cells = [
        cell for cell in plan(parsed.shapes, memory_gb, parsed.tokens) if any(part in cell.name for part in parsed.only)
    ]
    print(f"{report['hardware']}; steps of {parsed.tokens} tokens", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        return measure(cells, parsed, report, Path(directory))


def measure(cells: list[Cell], parsed: argparse.Namespace, report: dict[str, Any], directory: Path) -> int:
    """Run the checks and all cells; 1 when a check failed."""
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if parsed.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    deadline = time.monotonic() + parsed.budget_s
    sizes = {"tokens": parsed.tokens, "steps": parsed.steps}
    tasks: list[dict[str, Any]] = [{"kind": "checks", "cell": None}]
    tasks += [{"kind": "cell", "cell": asdict(cell)} for cell in cells]
    worker: Worker | None = Worker(tasks[0] | sizes, directory, environment)
    for i, cell in enumerate([None, *cells]):
        assert worker is not None
        following = None
        if i + 1 < len(tasks):
            following = Worker(tasks[i + 1] | sizes, directory, environment)
        left = deadline - time.monotonic()
        result = worker.run(min(left, parsed.cell_s)) if left > 5 else {"failed": "not begun: out of time"}
        worker.close()
        worker = following
        if cell is None:
            report["checks"] = result.get("checks", [result])
            for check in report["checks"]:
                print(check_line(check), flush=True)
            print(HEAD, flush=True)
        else:
            report["cells"].append({"name": cell.name, **asdict(cell), **result})
            print(row_line(report["cells"][-1]), flush=True)
        report["figures"] = figures(report["cells"])
        parsed.out.write_text(json.dumps(report, indent=2) + "\n")
    for figure, value in report["figures"].items():
        print(f"{figure:32}{value:>12.3f}", flush=True)
    return int(not all(check.get("passed", False) for check in report["checks"]))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


if __name__ == "__main__":
    sys.exit(main())
