"""``RUN/summary.json``: a run in a handful of numbers, computed from its metrics, events and spans alone."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_async.telemetry.accounting import rl_accounts
from slime_async.telemetry.jsonl import Problem, read_jsonl
from slime_async.telemetry.metrics import read_metrics
from slime_async.telemetry.overlap import overlap_of_run
from slime_async.telemetry.spans import Track, read_tracks


@dataclass(frozen=True, slots=True)
class Summary:
    """None means that it was not measured (no evaluation, no step yet)."""

    outcome: str
    """finished, failed, interrupted, or running"""
    accuracy_before: float | None
    """Held-out, at version 0; over sources, weighted by their tasks"""
    accuracy_after: float | None
    """Held-out, at the last version"""
    accuracy_supervised_only: float | None
    """Held-out, of the copy that went on with supervised steps instead of RL"""
    wall_s: float | None
    """From the launcher's start to the end"""
    steps: int
    """Batches that RL trained"""
    staleness_bound: int | None
    """η"""
    staleness_max: int | None
    """Over all tokens with non-zero weight in the loss"""
    staleness_mean: float | None
    """The same, weighted by tokens"""
    tokens_masked_as_stale: int
    trajectories_trained: int
    tokens_trained: int
    tokens_per_s: float | None
    """tokens_trained over the time from the RL phase's begin to its last step"""
    overlap_fraction: float | None
    """See ``slime_async.telemetry.overlap``"""
    updates_with_requests_in_flight: int
    """Weight updates that found any request running"""
    requests_in_flight_max: int
    reward_first: float | None
    """Mean reward of the first tenth of the steps"""
    reward_last: float | None
    """Of the last tenth"""
    actor_deaths: int
    hub_deaths: int
    learner_deaths: int
    mismatch_kl: float | None
    """k3 of π_prox/μ, mean over the last tenth of the steps"""
    mismatch_kl_max: float | None
    """Largest of any step"""
    mismatch_kl_floor: float | None
    """Of the run's first fresh batch: what engine and learner differ by on the same weights"""
    warnings: tuple[str, ...]
    """Names of the step warnings that were given, in the order of their first"""
    accounting: dict[str, dict[str, float]]
    """While RL ran, by role: the fraction of its time that each part took; see ``slime_async.telemetry.accounting``"""


def summarise(run: Path, problem: Problem | None = None) -> Summary:
    """Read what the run left, finished or not. ``problem`` as in ``read_jsonl``."""
    return summary_of(
        list(read_jsonl(run / "events.jsonl", problem)),
        list(read_metrics(run / "metrics.jsonl", problem=problem)),
        read_tracks(run / "spans", problem),
    )


def summary_of(events: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], tracks: Sequence[Track]) -> Summary:
    """The same from what was read already."""
    deaths = Counter(event["role"] for event in events if event["event"] == "role_died")
    start = _last(events, "run_started")
    end = _last(events, "run_finished")
    rewards = _column(steps, "reward_mean")
    tenth = max(1, len(rewards) // 10)
    trained = _column(steps, "tokens_trained")
    in_flight = _column(steps, "requests_in_flight_at_update")
    mismatch = _column(steps, "mismatch/k3")
    return Summary(
        outcome=str(end["outcome"]) if end else "running",
        accuracy_before=_accuracy(events, "before"),
        accuracy_after=_accuracy(events, "after"),
        accuracy_supervised_only=_accuracy(events, "supervised_only"),
        wall_s=end["time_s"] - start["time_s"] if start and end else None,
        steps=len(steps),
        staleness_bound=start["staleness_bound"] if start else None,
        staleness_max=int(max(stale)) if (stale := _column(steps, "staleness_max")) else None,
        staleness_mean=_weighted_staleness(steps),
        tokens_masked_as_stale=int(sum(_column(steps, "tokens_masked_as_stale"))),
        trajectories_trained=int(sum(_column(steps, "trajectories"))),
        tokens_trained=int(sum(trained)),
        tokens_per_s=_rate(events, steps, sum(trained)),
        overlap_fraction=overlap_of_run([span for track in tracks for span in track.spans]),
        updates_with_requests_in_flight=sum(requests > 0 for requests in in_flight),
        requests_in_flight_max=int(max(in_flight, default=0)),
        reward_first=_mean(rewards[:tenth]),
        reward_last=_mean(rewards[-tenth:]),
        actor_deaths=deaths["actor"],
        hub_deaths=deaths["hub"],
        learner_deaths=deaths["learner"],
        mismatch_kl=_mean(mismatch[-max(1, len(mismatch) // 10) :]),
        mismatch_kl_max=max(mismatch, default=None),
        mismatch_kl_floor=next(iter(_column(steps, "mismatch/k3/floor")), None),
        warnings=tuple(dict.fromkeys(str(event["name"]) for event in events if event["event"] == "step_warning")),
        accounting={role: side.fractions for role, side in rl_accounts(tracks).items()},
    )


def write_summary(run: Path) -> Summary:
    """Compute it and write ``summary.json``, whole or not at all."""
    summary = summarise(run)
    temporary = run / "summary.json.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(summary), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, run / "summary.json")
    return summary


def _last(events: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((event for event in reversed(events) if event["event"] == name), None)


def _accuracy(events: Sequence[dict[str, Any]], name: str) -> float | None:
    """Over the sources of one evaluation; of one that ran twice for a source, the last counts."""
    results = {e["source"]: e for e in events if e["event"] == "evaluation" and e["name"] == name}.values()
    tasks = sum(result["tasks"] for result in results)
    return sum(result["accuracy"] * result["tasks"] for result in results) / tasks if tasks else None


def _column(steps: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [step[name] for step in steps if name in step]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _weighted_staleness(steps: Sequence[dict[str, Any]]) -> float | None:
    pairs = [
        (s["staleness_mean"], s["tokens_trained"]) for s in steps if "staleness_mean" in s and "tokens_trained" in s
    ]
    tokens = sum(count for _, count in pairs)
    return sum(mean * count for mean, count in pairs) / tokens if tokens else None


def _rate(events: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], tokens: float) -> float | None:
    begins = [event["time_s"] for event in events if event["event"] == "phase" and event["name"] == "rl"]
    if not begins or not steps or steps[-1]["time_s"] <= begins[0]:
        return None
    return float(tokens / (steps[-1]["time_s"] - begins[0]))
