"""Run directories as the roles leave them, made in a moment."""

from __future__ import annotations

import json
import time
from pathlib import Path

from slime_async.telemetry.clocks import ClockSample
from slime_async.telemetry.events import EventLog
from slime_async.telemetry.jsonl import JsonLines
from slime_async.telemetry.metrics import MetricsWriter
from slime_async.telemetry.spans import SpanRecorder

CONFIG = """\
[run]
name = "made-up"

[batch]
groups = 4
group_size = 8
"""
STEP_NS = 10**9
WAITED_NS, TRAINED_NS, COMMITTED_NS = 250 * 10**6, 600 * 10**6, 50 * 10**6
"""Of each of the learner's steps; the rest is a copy of the weights"""


def write_run(run: Path, steps: int = 6, config: str = CONFIG) -> Path:
    """A finished run whose learner waits a quarter of the time and whose actor computes three quarters of it."""
    run.mkdir(parents=True)
    (run / "config.toml").write_text(config)
    (run / "environment.json").write_text(json.dumps({"python": "3.11.9", "gpus": [], "packages": {"torch": "2.13.0"}}))
    events = EventLog(run / "events.jsonl")
    events.write("run_started", staleness_bound=2)
    events.write("evaluation", name="before", source="held-out", accuracy=0.25, tasks=8, failed=0, version=0)
    events.write("phase", name="rl", done=False)
    _write_metrics(run, steps)
    events.write("warning", process="actor-0", level="warning", text="episode failed: <script>alert(1)</script>")
    events.write("evaluation", name="after", source="held-out", accuracy=0.75, tasks=8, failed=0, version=steps)
    events.write("run_finished", outcome="finished", reason="")
    events.close()
    _write_queue(run, steps)
    _write_spans(run, steps)
    return run


def _write_metrics(run: Path, steps: int) -> None:
    metrics = MetricsWriter(run / "metrics.jsonl")
    for step in range(steps):
        metrics.write(
            step,
            {
                "reward_mean": step / steps,
                "tokens_trained": 100,
                "sampled_tokens": 120,
                "staleness_mean": 0.5,
                "staleness_max": 2,
                "staleness/0": 60,
                "staleness/1": 40,
                "staleness/3": 20,
                "tokens_masked_as_stale": 20,
                "mismatch/ratio_mean": 1.01,
                "mismatch/ratio_max": 4.0,
                "mismatch/ratio_min": 0.2,
                "mismatch/ess": 0.97,
                "lease_wait_s": WAITED_NS / 1e9,
                "train_s": TRAINED_NS / 1e9,
                "commit_s": COMMITTED_NS / 1e9,
                "snapshot_s": (STEP_NS - WAITED_NS - TRAINED_NS - COMMITTED_NS) / 1e9,
                "step_s": STEP_NS / 1e9,
                "publish_s": 0.2,
            },
        )
    metrics.close()


def _write_queue(run: Path, steps: int) -> None:
    queue = JsonLines(run / "queue.jsonl")
    for step in range(steps):
        queue.write(
            {
                "time_s": time.time() + step,
                "held": 16 * step,
                "held_limit": 96,
                "pacing": 90,
                "pacing_limit": 96,
                "running": 32,
                "length_generated_mean": 6.5,
                "length_trained_mean": 6.0,
                "length_distance": 0.01,
            }
        )
    queue.close()


def _write_spans(run: Path, steps: int) -> None:
    begin = time.monotonic_ns()
    end = begin + steps * STEP_NS
    learner = SpanRecorder(run / "spans" / "learner.jsonl", "learner", "learner")
    learner.add("starting", begin - STEP_NS, begin)
    for step in range(steps):
        start = begin + step * STEP_NS
        waited, trained = start + WAITED_NS, start + WAITED_NS + TRAINED_NS
        learner.add("lease", start, waited, step=step)
        learner.add("train", waited, trained, step=step)
        learner.add("forward", waited, trained - 10**8)
        learner.add("commit", trained, trained + COMMITTED_NS, step=step)
        learner.add("snapshot", trained + COMMITTED_NS, start + STEP_NS, step=step)
        learner.add("publish", trained, trained + 2 * 10**8, version=step + 1)
        learner.add("broadcast", trained + 5 * 10**7, trained + 10**8, version=step + 1)
    learner.close()
    actor = SpanRecorder(run / "spans" / "actor-0.jsonl", "actor-0", "actor")
    actor.align(ClockSample(actor.now_ns(), 2 * 10**9, 10**6))
    shift = -2 * 10**9  # this actor's clock is two seconds behind the hub's
    actor.add("starting", begin + shift - STEP_NS, begin + shift)
    actor.add("generate", begin + shift, begin + shift + (end - begin) * 3 // 4)
    actor.add("idle", begin + shift + (end - begin) * 3 // 4, end + shift)
    actor.close()
    hub = SpanRecorder(run / "spans" / "hub.jsonl", "hub", "hub")
    hub.add("gate", end - (end - begin) // 8, end, cause="staleness")
    hub.close()
