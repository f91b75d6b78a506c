"""The metrics of a run: one JSON line per step in ``RUN/metrics.jsonl``, every name documented here.

A line holds ``step`` (the version it trained from, counting from 0), ``phase``, ``time_s`` (Unix time), and metrics.
Steps that are trained again after a restart appear twice; the last line counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slime_async.telemetry.jsonl import JsonLines, read_jsonl

Phase = Literal["warm_start", "control", "rl"]


@dataclass(frozen=True, slots=True)
class Metric:
    """``unit`` is empty for plain ratios and losses."""

    unit: str
    definition: str


METRICS: dict[str, Metric] = {
    "loss": Metric("", "What the optimizer minimised"),
    "grad_norm": Metric("", "Before clipping"),
    "learning_rate": Metric("", "Of this step"),
    "reward_mean": Metric("", "Mean reward of the batch, every trajectory counted"),
    "reward_std": Metric("", "Its standard deviation"),
    "groups_with_equal_rewards": Metric("groups", "Without a gradient: all their rewards are the same"),
    "groups_filtered": Metric("groups", "Dropped for equal rewards or by task.filter since the batch before"),
    "tokens_filtered": Metric("tokens", "Sampled in these groups"),
    "over_sampling": Metric("", "Groups generated for each that is trained: (batch.groups + groups_filtered) / groups"),
    "trajectories": Metric("trajectories", "In the batch and with any weight in the loss"),
    "truncated_trajectories": Metric("trajectories", "Ended by a limit of length or time"),
    "tokens_trained": Metric("tokens", "Sampled tokens with non-zero weight in the loss"),
    "tokens_masked_as_stale": Metric(
        "tokens", "Sampled tokens beyond the bound, without weight in the loss or dropped as a group"
    ),
    "tokens_trained_stale": Metric("tokens", "Beyond the bound but trained (on_stale = 'train')"),
    "staleness_mean": Metric("versions", "Token-weighted mean over tokens with non-zero weight in the loss"),
    "staleness_max": Metric("versions", "Largest over tokens with non-zero weight in the loss"),
    "answer_tokens_mean": Metric("tokens", "Sampled tokens per trajectory"),
    "batch_tokens": Metric("tokens", "Of the batch, prompts included"),
    "tokens": Metric("tokens", "Sampled tokens among those computed; what the diagnostics average over"),
    "sampled_tokens": Metric("tokens", "Sampled by the policy, masked ones included"),
    "tokens_computed": Metric("tokens", "Through the learner's model, prompts included"),
    "tokens_counted": Metric("tokens", "In the loss's denominator: sampled, before any masking"),
    "sequences": Metric("sequences", "Computed by the learner: those without any advantage may be left out"),
    "mixed_version_trajectories": Metric("trajectories", "Sampled by several versions: weights changed in flight"),
    "lease_wait_s": Metric("s", "Waited for the batch"),
    "train_s": Metric("s", "Forward, backward and optimizer"),
    "snapshot_s": Metric("s", "Copying the weights out of the model"),
    "publish_s": Metric("s", "The last finished publication, from its begin until the hub knew of it"),
    "pause_to_resume_s": Metric("s", "Of it, engines paused"),
    "broadcast_s": Metric("s", "Of it, the collective"),
    "publish_stall_s": Metric("s", "What publishing kept the learner from training"),
    "step_s": Metric("s", "From one step's end to the next's"),
    "learner_tokens_per_s": Metric("tokens/s", "Tokens of the batch, prompts included, over train_s"),
    "requests_in_flight_at_update": Metric("requests", "Running in all engines when the weights changed under them"),
    "engines": Metric("engines", "That took the weights"),
}
"""Each name once. The families below have their own documentation."""

FAMILIES = {
    "mismatch/": "π_prox/μ, by slime_async.correction.diagnostics",
    "policy/": "π_θ/π_prox, as above",
    "weight/": "importance weights, as above",
    "correction/": "what was masked or rejected, as above",
    "loss/": "parts of the loss, as above",
    "sequence/": "ratios of whole sequences, as above",
    "tokens/": "computed, by bucket of staleness, as above",
    "evaluation/": "of the evaluation that finished during this step, by source: slime_async.evaluation",
    "environment/": "the task's own numbers (Trajectory.metrics), averaged over the batch",
}


class MetricsWriter:
    """Appends a line per step; a name without documentation is refused, so that none is misspelt or unexplained."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, step: int, values: Mapping[str, float], phase: Phase = "rl") -> None:
        """Raises ``ValueError`` for names that are neither in ``METRICS`` nor of one of ``FAMILIES``."""
        unknown = [name for name in values if not is_documented(name)]
        if unknown:
            raise ValueError(f"metrics {', '.join(unknown)} are not documented: add them to {__name__}.METRICS")
        numbers = {name: float(value) for name, value in values.items()}
        self._lines.write({"step": step, "phase": phase, "time_s": time.time(), **numbers})

    def close(self) -> None:
        self._lines.close()


def is_documented(name: str) -> bool:
    return name in METRICS or name.startswith(tuple(FAMILIES))


def read_metrics(path: Path, phase: Phase = "rl") -> Iterator[dict[str, Any]]:
    """One line per step, ascending; of a step that was trained again, the last."""
    by_step = {line["step"]: line for line in read_jsonl(path) if line["phase"] == phase}
    yield from (by_step[step] for step in sorted(by_step))
