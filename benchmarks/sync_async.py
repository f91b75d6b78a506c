"""``slime-async bench`` on two CPU cores, workload after workload, as one result.

    python -m benchmarks.sync_async [--workloads short heavy_tailed slow_tools] [--directory DIR] [--out FILE]

A workload that was measured in DIR already is taken over, and so is each of its modes. About half an hour on two idle
cores. The figures are those of the heavy-tailed workload. (On GPUs: ``scripts/gpu-bench``.)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKLOADS = ("heavy_tailed", "short", "slow_tools")
HEADLINE = "heavy_tailed"


def measure(workload: str, directory: Path) -> dict[str, Any]:
    """The result of one workload's benchmark. Raises ``RuntimeError`` when it has none."""
    config, output = ROOT / "examples" / "bench" / f"{workload}.toml", directory / workload
    command = [sys.executable, "-m", "slime_async.cli.main", "bench", str(config), "--output", str(output)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    result = output / "bench.json"
    if not result.exists():
        raise RuntimeError(f"{workload}: the benchmark ended with exit code {code} and no result")
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded | {"command": f"slime-async bench {config.relative_to(ROOT)}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--directory", type=Path, default=Path("runs") / "sync-async", help="[runs/sync-async]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sync_async_cpu.json")
    parsed = parser.parse_args()
    results = {workload: measure(workload, parsed.directory.resolve()) for workload in parsed.workloads}
    first = results[HEADLINE if HEADLINE in results else parsed.workloads[0]]
    result = {
        "command": "python -m benchmarks.sync_async",
        **{name: first[name] for name in ("date", "machine", "versions")},
        "seconds": sum(one["seconds"] for one in results.values()),
        "figures": first["figures"]
        | {
            f"{workload}/{name}": value
            for workload, one in results.items()
            for name, value in one["figures"].items()
            if workload != HEADLINE
        },
        "workloads": results,
    }
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(parsed.out)


if __name__ == "__main__":
    main()
