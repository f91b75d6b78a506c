"""Our numbers under Prometheus' conventions: one prefix, base units as suffixes, ``_total`` for what only grows.

===================  ==========================================  =================================================
ours                 exported                                    rule
===================  ==========================================  =================================================
step_s               slime_async_learner_step_seconds            role, then the name; s is seconds
held_bytes           slime_async_hub_held_bytes                  …_bytes and …_tokens stay
learner_tokens_per_s slime_async_learner_tokens_per_second       the role is not said twice
failures             slime_async_hub_failures_total              counts since the start are counters
mismatch/ess         slime_async_learner_mismatch_ess            a slash is an underscore
policy/k1/staleness_2-3   …_policy_k1_by_staleness{staleness="2-3"}   a bucket is a label
staleness/1          …_sampled_tokens_by_staleness{staleness="1"}
===================  ==========================================  =================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from slime_async.protocol import Scalar
from slime_async.telemetry.families import FAMILY_METRICS
from slime_async.telemetry.metrics import FAMILIES, METRICS

PREFIX = "slime_async"
COUNTERS = frozenset(
    {
        "accepted",
        "durable",
        "dropped",
        "duplicates",
        "unwanted",
        "failures",
        "returned",
        "masked_tokens",
        "masked_trajectories",
        "trained_stale_tokens",
        "dropped_stale_tokens",
        "dropped_stale_groups",
        "dropped_failed_groups",
        "dropped_equal_rewards_groups",
        "generated_tokens",
        "warnings",
    }
)
"""Counts since the process's start, or the run's; all of ``rollout/`` are, too"""
ROLLOUT = "rollout/"
LABELLED = (("rollout/failed/", "kind"), ("rollout/truncated/", "reason"))
"""What a name begins with → the label that the rest of it is"""
ACTOR_HELP = {
    "weight_version": "Version of the weights that the engine samples with; -1 before the first",
    "running_requests": "Requests that are being sampled",
    "waiting_requests": "Requests that wait for a slot of the engine",
    "generated_tokens": "Tokens sampled since the actor's start",
    "actor_tokens_per_s": "Tokens sampled a second, over the last heartbeat",
    "rollout/finished": "Episodes that gave a trajectory",
    "rollout/failed": "Episodes that failed, by kind of failure",
    "rollout/truncated": "Episodes cut off at a limit, by limit",
    "rollout/sampled_tokens": "Tokens of finished episodes that were sampled",
    "rollout/resubmissions": "Generations that an abort cut off and that were continued",
    "rollout/busy_s": "Time of all episodes together",
}
"""The learner's numbers have theirs in ``telemetry.metrics``, the hub's in ``transport.observer.SAMPLED``"""
_BUCKET = re.compile(r"(.+)/staleness_([\d+-]+)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One number, as it is exported."""

    name: str
    value: float
    counter: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    """Our name, without what became a label"""


def exported(role: str, numbers: Mapping[str, Scalar]) -> Iterator[Sample]:
    """All numbers among them; what is text is left out."""
    for key, value in numbers.items():
        if isinstance(value, str):
            continue
        family, labels = _labels(key)
        if family == "rollout/failed" and not labels:
            continue  # the sum of the labelled ones
        counter = family in COUNTERS or family.startswith(ROLLOUT)
        yield Sample(exported_name(role, family, counter, bool(labels)), float(value), counter, labels, family)


def exported_name(role: str, key: str, counter: bool = False, by_staleness: bool = False) -> str:
    """The name of one of our numbers."""
    name = re.sub(r"[^a-zA-Z0-9]+", "_", key).strip("_")
    name = name.removeprefix(f"{role}_")
    if name.endswith("_per_s"):
        name = name.removesuffix("_s") + "_second"
    elif name.endswith("_s"):
        name = name.removesuffix("_s") + "_seconds"
    if by_staleness and not key.startswith(ROLLOUT):
        name += "_by_staleness"
    return f"{PREFIX}_{role}_{name}" + ("_total" if counter else "")


def help_of(role: str, key: str, sampled: Mapping[str, str]) -> str:
    """What a number is, in a line; ``sampled`` are the hub's own."""
    if role == "hub":
        return sampled.get(key, key).replace("`", "")
    if role == "actor":
        return ACTOR_HELP.get(key, key)
    known = METRICS.get(key) or FAMILY_METRICS.get(key)
    if known is not None:
        return known.definition
    return next((text for prefix, text in FAMILIES.items() if f"{key}/".startswith(prefix)), key)


def learner_names() -> Iterable[str]:
    """Names of everything that a learner may export, for those who look at dashboards."""
    for key in ("step", "steps", *METRICS, *FAMILY_METRICS):
        yield exported_name("learner", key)
        yield exported_name("learner", key, by_staleness=True)


def _labels(key: str) -> tuple[str, dict[str, str]]:
    """A name without its labels, and these."""
    if match := _BUCKET.fullmatch(key):
        return match[1], {"staleness": match[2]}
    if key.startswith("staleness/"):
        return "sampled_tokens", {"staleness": key.removeprefix("staleness/")}
    for prefix, label in LABELLED:
        if key.startswith(prefix):
            return prefix.rstrip("/"), {label: key.removeprefix(prefix)}
    return key, {}
