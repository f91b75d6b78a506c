"""Kill hub, actors and learner with SIGKILL, at random and aimed, then let the run finish and audit it.

    python -m benchmarks.chaos [--seconds 180] [--least 5] [--steps 300] [--seed 0] [--out FILE]

The demo with two actors and a checkpoint every ten batches. First each role dies at chosen points (between optimizer
step and commit, in the middle of a delivery, during a weight sync, during a checkpoint), then all are killed at random
for ``--seconds``, each at least ``--least`` times. The run must end well, its audit must be clean, and its accuracy is
the demo's. Recovery: from a kill until two steps in a row took at most 1.5 times the run's median step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chaos.run import AIMS, Outcome, demo_config, run_under_fire

ROOT = Path(__file__).parents[2]
ROLES = ("hub", "actor", "learner")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--least", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    parsed = parser.parse_args(arguments)
    settings = {
        "run.name": "chaos",
        "run.directory": str(parsed.directory),
        "run.steps": str(parsed.steps),
        "run.seed": str(parsed.seed),
        "actor.count": "2",
        "actor.max-restarts": "200",
        "learner.max-restarts": "200",
        "hub.max-restarts": "200",
        "checkpoint.interval-steps": "10",
        "hub.heartbeat-timeout-s": "5",
    }
    outcome = run_under_fire(demo_config(settings), AIMS, parsed.seconds, parsed.least, parsed.seed)
    for line in (*table(outcome), *outcome.audit.lines()):
        print(line)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text(json.dumps(result(outcome, parsed), indent=2) + "\n")
    return 0 if outcome.exit_code == 0 and outcome.audit.clean else 1


def recoveries(outcome: Outcome, role: str = "") -> list[float]:
    return [d.recovered_s for d in outcome.deaths if d.recovered_s is not None and role in ("", d.role)]


def table(outcome: Outcome) -> list[str]:
    kills = Counter(death.role for death in outcome.deaths)
    lines = ["", f"{'role':10}{'kills':>7}{'recovery median':>18}{'worst':>10}"]
    for role in ROLES:
        times = recoveries(outcome, role)
        shown = (f"{statistics.median(times):.1f} s", f"{max(times):.1f} s") if times else ("–", "–")
        lines.append(f"{role:10}{kills[role]:>7}{shown[0]:>18}{shown[1]:>10}")
    return [*lines, ""]


def result(outcome: Outcome, parsed: argparse.Namespace) -> dict[str, Any]:
    times, summary = recoveries(outcome), outcome.summary
    return {
        "command": f"python -m benchmarks.chaos --seconds {parsed.seconds:g} --least {parsed.least} "
        f"--steps {parsed.steps} --seed {parsed.seed}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}, one machine for all roles",
        "figures": {
            "kills": len(outcome.deaths),
            "recovery_s_median": statistics.median(times) if times else None,
            "recovery_s_worst": max(times, default=None),
            "audit_clean": outcome.audit.clean,
            "accuracy_before": summary.accuracy_before,
            "accuracy_after": summary.accuracy_after,
        },
        "by_role": {
            role: {
                "kills": sum(death.role == role for death in outcome.deaths),
                "recovery_s": recoveries(outcome, role),
            }
            for role in ROLES
        },
        "aimed": {role: [point for point, _ in aims] for role, aims in AIMS.items()},
        "steps": summary.steps,
        "wall_s": summary.wall_s,
        "trained_again": outcome.audit.trained_again,
        "rollbacks": outcome.audit.rollbacks,
        "audit": list(outcome.audit.lines()),
    }


if __name__ == "__main__":
    sys.exit(main())
