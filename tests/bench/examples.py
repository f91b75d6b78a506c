"""Measurements as a benchmark makes them, by hand."""

from __future__ import annotations

from typing import Any

from slime_async.bench.compare import compare
from slime_async.bench.measure import Measurement
from slime_async.bench.modes import Mode, modes_of
from slime_async.bench.saturated import EngineRate, SaturatedEngine, SaturatedLearner
from slime_async.bench.windows import Window
from slime_async.config import Config

BATCH, TOKENS = 16, 100
ENGINE = SaturatedEngine((EngineRate(1, 200.0), EngineRate(16, 1600.0)), float(TOKENS), 120.0)
"""A batch of 1,600 sampled tokens takes one engine a second"""
LEARNERS = {1: SaturatedLearner(devices=1, batch_s=0.8, batch_tokens=BATCH * 120.0)}


def modes(*names: str) -> list[Mode]:
    return modes_of(Config.model_validate({"bench": {"modes": names}, "evaluation": {"before": False, "after": False}}))


def measurement(mode: Mode, step_s: float, **changes: Any) -> Measurement:
    steps = 10
    windows = tuple(
        Window(i * steps * step_s, (i + 1) * steps * step_s, steps, steps * BATCH, steps * BATCH * TOKENS, steps * 1920)
        for i in range(3)
    )
    given: dict[str, Any] = {
        "mode": mode.name,
        "layout": mode.layout,
        "learner_devices": mode.learner_devices,
        "actor_devices": mode.actor_devices,
        "engine_ranks": 1,
        "max_staleness": mode.max_staleness,
        "synchronous": mode.synchronous,
        "windows": windows,
        "step_s": step_s,
        "tokens_per_sample": float(TOKENS),
        "computing": {"0": 0.5, "1": 0.9},
        "waiting": {
            "actor": {"computing": 0.9, "weight_sync": 0.1},
            "learner": {"computing": 0.8, "queue_empty": 0.19, "unaccounted": 0.01},
        },
        "generate_s": step_s * 0.9,
        "train_s": 0.8,
        "publish_s": 0.01,
        "pause_s": 0.005,
        "overlap": 0.9,
        "staleness_mean": float(mode.max_staleness),
        "staleness_max": mode.max_staleness,
        "trained_tokens_per_s": BATCH * TOKENS / step_s,
        "masked_fraction": 0.0,
        "accuracy": ((5.0, 0.3), (10.0, 0.6)),
        "time_to_target_s": None,
        "lengths": tuple(range(50, 150)) * 4,
        "deaths": 0,
        "warmup_s": 3.0,
        "timeline": {"learner": ((0.0, 1.0, "computing"), (1.0, 2.0, "queue_empty"))},
    }
    return Measurement(**{**given, **changes})


def bench_result() -> dict[str, Any]:
    """What ``bench.json`` has, as far as the simulator reads it."""
    chosen = modes("colocated", "disaggregated", "async-2")
    result = compare(chosen, [measurement(mode, 2.0) for mode in chosen], ENGINE, LEARNERS).to_plain()
    source = "task.train.answers"
    return {
        **result,
        "config": {
            "batch.groups": 4,
            "batch.group_size": 4,
            "staleness.on_stale": "mask",
            "actor.slots": 16,
            "actor.max_running_requests": 16,
            f"{source}.factory": "slime_async.actors.workloads:answers",
            f"{source}.arguments.median": 80,
            f"{source}.arguments.sigma": 0.5,
            f"{source}.arguments.longest": 200,
        },
    }
