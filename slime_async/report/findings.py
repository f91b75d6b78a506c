"""What a run's numbers say is wrong, each with what to do: a handful of rules, every one with its threshold named."""

from __future__ import annotations

from collections.abc import Iterator

from slime_async.report.run import RunData
from slime_async.telemetry.accounting import COMPUTING, PARTS, UNACCOUNTED, largest_wait, rl_accounts

RECENT_STEPS = 20
"""Rules look at the mean over so many last steps"""
WAITING_TOO_MUCH = 0.5
STALE_TOKENS = 0.05
EQUAL_GROUPS = 0.8
LENGTH_DISTANCE = 0.15
"""Kolmogorov–Smirnov; below it is what a few hundred trajectories give by chance"""
RATIO_ALARM = 100.0
CLIPPED_TOKENS = 0.2
UNACCOUNTED_TIME = 0.01

SLOW_LEARNER = "the learner is the slow side: add ranks, take fewer actors, or raise "
REMEDIES = {
    "queue_empty": "add actors, or raise actor.slots",
    "admission_staleness": SLOW_LEARNER + "staleness.max_staleness",
    "admission_queue_full": SLOW_LEARNER + "batch.queue_trajectories",
    "weight_sync": "look at pause and broadcast in the timeline; weights.backend and weights.pause decide their cost",
    "environment": "the task's own code computes: make it faster, or raise actor.slots so that others fill the gap",
    "delivery": "the hub is slow to acknowledge: is its machine overloaded?",
}


def findings(run: RunData) -> list[str]:
    """Sentences, the weightiest first; empty where nothing stands out."""
    return [*_waiting(run), *_ratios(run), *_batches(run), *_lengths(run)]


def recent(run: RunData, metric: str) -> float | None:
    """Mean over the last steps that have it."""
    values = [value for _, value in run.by_step(metric)[-RECENT_STEPS:]]
    return sum(values) / len(values) if values else None


def _waiting(run: RunData) -> Iterator[str]:
    for role, side in rl_accounts(run.tracks).items():
        name = "The learner" if role == "learner" else "The actors"
        computing, wait = side.fractions.get(COMPUTING, 0.0), largest_wait(side)
        if wait is not None and 1 - computing > WAITING_TOO_MUCH:
            remedy = REMEDIES.get(wait[0], "see the timeline")
            most = f"{PARTS[wait[0]]} ({wait[1]:.0%})"
            yield f"{name} computed {computing:.0%} of the time; most of the rest: {most}: {remedy}."
        if (lost := side.fractions.get(UNACCOUNTED, 0.0)) > UNACCOUNTED_TIME:
            yield f"{name}: {lost:.1%} of the time is in no span. Was a process killed, or its clock set?"


def _ratios(run: RunData) -> Iterator[str]:
    largest = max((value for _, value in run.by_step("mismatch/ratio_max")), default=0.0)
    if largest > RATIO_ALARM:
        yield (
            f"π_prox/μ reached {largest:.3g}: engine and learner may compute something different (precision, sampling "
            "parameters, a wrong chat template), or tokens are far too old."
        )
    clipped = recent(run, "policy/clip_fraction")
    if clipped is not None and clipped > CLIPPED_TOKENS:
        yield f"The clip takes the gradient of {clipped:.0%} of the tokens: lower learner.learning_rate."


def _batches(run: RunData) -> Iterator[str]:
    sampled = sum(value for _, value in run.by_step("sampled_tokens"))
    masked = run.summary.tokens_masked_as_stale
    if sampled and masked / sampled > STALE_TOKENS:
        yield f"{masked / sampled:.0%} of the sampled tokens were masked as stale: raise staleness.max_staleness."
    equal, groups = recent(run, "groups_with_equal_rewards"), run.config.get("batch.groups")
    if equal is not None and isinstance(groups, int) and equal / groups > EQUAL_GROUPS:
        yield (
            f"{equal / groups:.0%} of the last groups had equal rewards and gave no gradient: the tasks are too easy "
            "or too hard by now; mix others in, or set batch.drop_equal_rewards = true."
        )


def _lengths(run: RunData) -> Iterator[str]:
    last = run.queue[-1] if run.queue else {}
    distance = last.get("length_distance", 0.0)
    if distance > LENGTH_DISTANCE:
        yield (
            f"Trained trajectories are {last['length_trained_mean']:.0f} tokens long, generated ones "
            f"{last['length_generated_mean']:.0f}: the bound discards by length. Raise staleness.max_staleness."
        )
