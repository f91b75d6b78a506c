"""One measurement in its own process: a cell, or the checks.

It imports everything, says ``ready``, and begins when it is given a line: the next measurement's imports run while this
one measures.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner.cells import Cell
from benchmarks.learner.checks import run_checks
from benchmarks.learner.kernels import profile_step, synchronisations
from benchmarks.learner.shapes import PEAK_FLOPS, SHAPES, batch_lengths
from benchmarks.learner.trainers import learner_step, sequences_of, transformers_step


def measure(cell: Cell, tokens: int, steps: int, device: torch.device, out: Path) -> None:
    """Timed whole steps after one that compiles and allocates; then, if asked for, one that is looked into."""
    shape, lengths = SHAPES[cell.shape], batch_lengths(tokens, cell.sequence)
    sequences = sequences_of(shape, lengths)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    begun = time.perf_counter()
    if cell.trainer == "slime_async":
        step = learner_step(cell, shape, sequences, dtype)
    else:
        step = transformers_step(cell, shape, sequences, dtype, device)
    built = time.perf_counter()
    step()
    warm = time.perf_counter()
    seconds = [_timed(step, device) for _ in range(steps)]
    mean = sum(seconds) / len(seconds)
    flops = shape.flops(lengths)
    result: dict[str, Any] = {
        "tokens": int(lengths.sum()),
        "build_s": built - begun,
        "warm_up_s": warm - built,
        "step_s": mean,
        "steps_s": seconds,
        "tokens_per_s": float(lengths.sum()) / mean,
        "tflops": flops / mean / 1e12,
        "mfu": flops / mean / PEAK_FLOPS,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None,
    }
    out.write_text(json.dumps(result))
    if cell.profile:
        result["synchronisations"] = synchronisations(step, device)
        result["time"] = profile_step(step, device)
        out.write_text(json.dumps(result))


def _timed(step: Callable[[], float], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def work(task: dict[str, Any], device: torch.device, out: Path) -> None:
    if task["kind"] == "checks":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        out.write_text(json.dumps({"checks": [check.as_dict() for check in run_checks(device, dtype)]}))
    else:
        measure(Cell(**task["cell"]), task["tokens"], task["steps"], device, out)


def main() -> int:
    task, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    if task["cell"] is not None and task["cell"]["trainer"] == "transformers":
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    else:
        import slime_async.learner.trainer  # noqa: F401
    print("ready", flush=True)
    sys.stdin.readline()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        work(task, device, out)
    except torch.OutOfMemoryError as error:
        if not out.exists():
            out.write_text(json.dumps({"out_of_memory": str(error).splitlines()[0][:300]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
