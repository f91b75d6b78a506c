"""The metrics of a run: one JSON line per step in ``RUN/metrics.jsonl``, every name documented here.

A line holds ``step`` (the version it trained from, counting from 0), ``phase``, ``incarnation`` (which start of the
learner wrote it), ``time_s`` (Unix time), and metrics.

A learner that restarts goes on from its latest checkpoint, so that steps appear again. What it takes back is the
history from its first step on, not only the lines it writes itself: a reader that meets a newer incarnation forgets all
earlier lines from that step on, and ignores lines of older incarnations that come later (``read_metrics`` does both).
A checkpoint is complete only after the lines of all its steps are written, so no step is ever missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slime_async.telemetry.jsonl import JsonLines, Problem, read_jsonl

Phase = Literal["warm_start", "control", "rl"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One documented number."""

    unit: str
    """Empty for plain ratios and losses"""
    definition: str
    remedy: str = ""
    """What it looks like when it is bad, and what to do then; empty where it only describes"""


METRICS: dict[str, Metric] = {
    "loss": Metric("", "What the optimizer minimised", "Its level means little in RL; judge by reward and accuracy"),
    "grad_norm": Metric("", "Before clipping", "Spikes, or grows for long: lower `learner.learning_rate`"),
    "learning_rate": Metric("", "Of this step"),
    "reward_mean": Metric(
        "", "Mean reward of the batch, every trajectory counted", "Flat from the start: are any rewards above 0 at all?"
    ),
    "reward_std": Metric("", "Its standard deviation", "0: all answers are judged alike, and nothing can be learnt"),
    "groups_with_equal_rewards": Metric(
        "groups",
        "Without a gradient: all their rewards are the same",
        "Most of them: tasks are too easy or too hard; mix sources, or `batch.drop_equal_rewards = true`",
    ),
    "groups_filtered": Metric(
        "groups",
        "Dropped for equal rewards or by task.filter since the batch before",
        "More than are trained: tasks are too easy or too hard; mix in others",
    ),
    "tokens_filtered": Metric("tokens", "Sampled in these groups"),
    "over_sampling": Metric("", "Groups generated for each that is trained: (batch.groups + groups_filtered) / groups"),
    "trajectories": Metric("trajectories", "In the batch and with any weight in the loss"),
    "truncated_trajectories": Metric("trajectories", "Ended by a limit of length or time"),
    "tokens_trained": Metric("tokens", "Sampled tokens with non-zero weight in the loss"),
    "tokens_masked_as_stale": Metric(
        "tokens",
        "Sampled tokens beyond the bound, without weight in the loss or dropped as a group",
        "More than a few percent is wasted work: raise `staleness.max_staleness`, or bound the answers' length",
    ),
    "tokens_trained_stale": Metric(
        "tokens", "Beyond the bound but trained (on_stale = 'train')", "Many: watch `mismatch/` closely"
    ),
    "staleness_mean": Metric("versions", "Token-weighted mean over tokens with non-zero weight in the loss"),
    "staleness_max": Metric("versions", "Largest over tokens with non-zero weight in the loss"),
    "answer_tokens_mean": Metric(
        "tokens", "Sampled tokens per trajectory", "Grows without reward: check the reward for a bias to length"
    ),
    "batch_tokens": Metric("tokens", "Of the batch, prompts included"),
    "tokens": Metric("tokens", "Sampled tokens among those computed; what the diagnostics average over"),
    "sampled_tokens": Metric("tokens", "Sampled by the policy, masked ones included"),
    "tokens_computed": Metric("tokens", "Through the learner's model, prompts included"),
    "tokens_counted": Metric("tokens", "In the loss's denominator: sampled, before any masking"),
    "sequences": Metric("sequences", "Computed by the learner: those without any advantage may be left out"),
    "mixed_version_trajectories": Metric("trajectories", "Sampled by several versions: weights changed in flight"),
    "lease_wait_s": Metric(
        "s", "Waited for the batch", "Most of `step_s`: actors are too slow; add actors, or raise `actor.slots`"
    ),
    "train_s": Metric(
        "s", "Forward, backward and optimizer", "Most of `step_s` while actors idle: add learner ranks, fewer actors"
    ),
    "commit_s": Metric("s", "Until the hub acknowledged the commit", "Seconds: the hub's machine is overloaded"),
    "snapshot_s": Metric("s", "Copying the weights out of the model"),
    "publish_s": Metric("s", "The last finished publication, from its begin until the hub knew of it"),
    "pause_to_resume_s": Metric(
        "s", "Of it, engines paused", "Far above `broadcast_s`: some engine is slow to pause; see the timeline"
    ),
    "broadcast_s": Metric("s", "Of it, the collective", "Slow: is `weights.backend` what the devices can do?"),
    "publish_stall_s": Metric(
        "s", "What publishing kept the learner from training", "Above 0 for long: publications take longer than steps"
    ),
    "checkpoint_stall_s": Metric(
        "s",
        "What checkpoints kept the learner from training, since the last line",
        "Most of a step: set `checkpoint.async_write`, or a longer `checkpoint.interval_steps`",
    ),
    "step_s": Metric("s", "From one step's end to the next's"),
    "learner_tokens_per_s": Metric("tokens/s", "Tokens of the batch, prompts included, over train_s"),
    "requests_in_flight_at_update": Metric("requests", "Running in all engines when the weights changed under them"),
    "engines": Metric("engines", "That took the weights", "Fewer than were started: see the actors' logs"),
}
"""Each name once. The families below have their own documentation."""

FAMILIES = {
    "mismatch/": "π_prox/μ: what staleness and the engine's numerics did before the update; /floor: the numerics alone",
    "policy/": "π_θ/π_prox: what the update itself did",
    "weight/": "importance weights, after truncation and normalisation",
    "correction/": "what was masked or rejected",
    "loss/": "parts of the loss",
    "router/": "auxiliary losses of a mixture of experts (`megatron.moe_aux_loss_coeff`, `moe_z_loss_coeff`)",
    "critic/": 'the value head, with `algorithm.advantage = "gae"`',
    "staleness/": "sampled tokens of the batch by their age in versions, masked ones included",
    "sequences/": "computed, by bucket of staleness",
    "tokens/": "computed, by bucket of staleness",
    "truncated/": "trajectories of the batch that a limit ended, by reason: `length`, `deadline`, …",
    "failed/": "episodes that came to nothing since the batch before, by reason; their samples are generated again",
    "evaluation/": "of the evaluation that finished during this step, by source",
    "environment/": "the task's own numbers (Trajectory.metrics), averaged over the batch",
}
"""What a name begins with → what all of those are; ``slime_async.telemetry.families`` has each of ours."""


class MetricsWriter:
    """Appends a line per step; a name without documentation is refused, so that none is misspelt or unexplained."""

    def __init__(self, path: Path, incarnation: int = 1) -> None:
        self._lines = JsonLines(path)
        self._incarnation = incarnation

    def write(self, step: int, values: Mapping[str, float], phase: Phase = "rl") -> None:
        """Raises ``ValueError`` for names that are neither in ``METRICS`` nor of one of ``FAMILIES``."""
        unknown = [name for name in values if not is_documented(name)]
        if unknown:
            raise ValueError(f"metrics {', '.join(unknown)} are not documented: add them to {__name__}.METRICS")
        numbers = {name: float(value) for name, value in values.items()}
        who = {"step": step, "phase": phase, "incarnation": self._incarnation}
        self._lines.write({**who, "time_s": time.time(), **numbers})

    def close(self) -> None:
        self._lines.close()


def is_documented(name: str) -> bool:
    return name in METRICS or name.startswith(tuple(FAMILIES))


def read_metrics(path: Path, phase: Phase = "rl", problem: Problem | None = None) -> Iterator[dict[str, Any]]:
    """One line per step, ascending: those of the present weights' history, as the module's docstring says.

    ``problem`` as in ``read_jsonl``.
    """
    by_step: dict[int, dict[str, Any]] = {}
    incarnation = 0
    for line in read_jsonl(path, problem):
        if line["phase"] != phase or line["incarnation"] < incarnation:
            continue
        if line["incarnation"] > incarnation:
            incarnation = line["incarnation"]
            by_step = {step: kept for step, kept in by_step.items() if step < line["step"]}
        by_step[line["step"]] = line
    yield from (by_step[step] for step in sorted(by_step))
