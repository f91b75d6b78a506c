"""The demo on a Ray cluster of raylets on this machine; the node that holds the learner is killed in the middle of RL.

The cluster has a head without CPUs, where the driver and the hub are, and a node more than the roles need.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[1]
ACTORS = 2
TIMEOUT_S = 1500.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--kill-at-step", type=int, default=50)
    parser.add_argument("--accuracy", type=float, default=0.85)
    parsed = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else reaches this cluster's loopback
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(ACTORS + 2)]
    try:
        with tempfile.TemporaryDirectory(prefix="ray-test-") as directory:
            return under_fire(cluster, nodes, Path(directory) / "demo", parsed)
    finally:
        ray.shutdown()
        cluster.shutdown()


def under_fire(cluster: Cluster, nodes: list[object], run: Path, parsed: argparse.Namespace) -> int:
    argv = [sys.executable, "-m", "slime_async.cli.main", "train", "examples/demo.toml", "--launcher", "ray"]
    argv += ["--run-directory", str(run), "--run.steps", str(parsed.steps), "--actor.count", str(ACTORS)]
    argv += ["--checkpoint.interval-steps", "20", "--run.log-interval-s", "20"]
    training = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": cluster.address})
    try:
        wait_for_step(run, parsed.kill_at_step, training)
        ray.init(address=cluster.address, log_to_driver=False)
        victim = node_of("learner", nodes)
        print(f"killing the learner's node {victim.node_id[:8]} at step {steps(run)}", flush=True)
        cluster.remove_node(victim, allow_graceful=False)
        code = training.wait(TIMEOUT_S)
    finally:
        training.kill()
        training.wait()
    return code or check(run, parsed.accuracy)


def node_of(role: str, nodes: list[object]):  # type: ignore[no-untyped-def]
    """The raylet in which this role's placement group lies."""
    [group] = [group for group in ray.util.placement_group_table().values() if group["name"] == role]
    [node_id] = set(group["bundles_to_node_id"].values())
    return next(node for node in nodes if node.node_id == node_id)  # type: ignore[attr-defined]


def check(run: Path, wanted: float) -> int:
    """What the run left: its accuracy, who died, that nothing was lost, that no key is on a command line."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    died = [event["process"] for event in events if event["event"] == "role_died"]
    summary = json.loads((run / "summary.json").read_text())
    print(f"died: {died}; {summary['outcome']}; accuracy {summary['accuracy_before']} → {summary['accuracy_after']}")
    assert "learner" in died, died
    assert summary["accuracy_after"] >= wanted, f"{summary['accuracy_after']} < {wanted}"
    audit = [sys.executable, "-m", "slime_async.cli.main", "audit", str(run)]
    code = subprocess.run(audit, cwd=ROOT).returncode
    print("Ray: several nodes, one killed, finished" if code == 0 else "the audit is not clean")
    return code


def wait_for_step(run: Path, step: int, training: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while steps(run) < step:
        assert training.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, f"no step {step} within {TIMEOUT_S:g} s"
        time.sleep(0.5)


def steps(run: Path) -> int:
    """Lines of RL so far."""
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"phase": "rl"') if metrics.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
