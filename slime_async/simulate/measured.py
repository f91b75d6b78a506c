"""From a benchmark's result to the scenarios of its modes, and how far the simulation is from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slime_async.simulate.cluster import simulate
from slime_async.simulate.scenario import EngineModel, LearnerModel, LengthModel, Scenario

FORCED = "slime_async.actors.workloads:"
"""Sources whose lengths the configuration tells; of others, the measured ones are drawn from"""


@dataclass(frozen=True, slots=True)
class Check:
    """One mode, simulated and measured."""

    mode: str
    predicted: float
    """Samples per second"""
    measured: float

    @property
    def error(self) -> float:
        return abs(self.predicted - self.measured) / self.measured

    def to_plain(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.error}


def scenario_of(result: Mapping[str, Any], mode: str) -> Scenario:
    """A mode of ``bench.json``, from the rates that each side reached alone in the same benchmark."""
    config, row, saturated = result["config"], result["modes"][mode], result["saturated"]
    engine = saturated["engine"]
    points = sorted((rate["running"], rate["running"] / rate["tokens_per_s"]) for rate in engine["rates"])
    learners, actors = row["learner_devices"], row["actor_devices"]
    colocated = bool(set(learners) & set(actors))
    arguments = _forced_arguments(config)
    return Scenario(
        name=mode,
        groups=config["batch.groups"],
        group_size=config["batch.group_size"],
        max_staleness=row["max_staleness"],
        on_stale=config["staleness.on_stale"],
        publish="batch_boundary" if mode.startswith("one-step-off") else "in_flight",
        engines=len(actors),
        slots=config["actor.slots"],
        engine=EngineModel(
            devices=row["engine_ranks"],
            max_running=min(config["actor.slots"], config["actor.max_running_requests"]),
            step_s=tuple(points),
        ),
        learner=LearnerModel(devices=len(learners), token_s=_token_s(saturated["learner"], row, colocated)),
        colocated=colocated,
        lengths=_lengths(arguments, result),
        turns=int(arguments.get("turns", 1)),
        environment_s=_delays(arguments),
        prompt_tokens=engine["total_tokens_per_sample"] - engine["tokens_per_sample"],
        publish_s=row["publish_s"],
        pause_s=row["pause_s"],
        steps=60,
        warmup_steps=10 + row["max_staleness"],
    )


def _token_s(learners: Mapping[str, Any], row: Mapping[str, Any], colocated: bool) -> float:
    """Alone, as it was measured; on devices that it shares, as it was in the run itself: nobody else computes then."""
    if str(len(row["learner_devices"])) in learners and not colocated:
        return float(1 / learners[str(len(row["learner_devices"]))]["tokens_per_s"])
    batches = sum(window["steps"] for window in row["windows"])
    return float(row["train_s"] * batches / sum(window["batch_tokens"] for window in row["windows"]))


def check(result: Mapping[str, Any]) -> list[Check]:
    """Every mode of a benchmark."""
    return [
        Check(mode, simulate(scenario_of(result, mode)).samples_per_s, row["samples_per_s"]["mean"])
        for mode, row in result["modes"].items()
    ]


def _forced_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the one training source, where its lengths are prescribed."""
    for key, value in config.items():
        if key.startswith("task.train.") and key.endswith(".factory") and str(value).startswith(FORCED):
            prefix = key.removesuffix("factory") + "arguments."
            return {name.removeprefix(prefix): v for name, v in config.items() if name.startswith(prefix)}
    return {}


def _lengths(arguments: Mapping[str, Any], result: Mapping[str, Any]) -> LengthModel:
    if not arguments:
        return LengthModel(measured=tuple(result["lengths"]))
    return LengthModel(median=arguments["median"], sigma=arguments["sigma"], longest=arguments["longest"])


def _delays(arguments: Mapping[str, Any]) -> LengthModel | None:
    if "tool_median_s" not in arguments:
        return None
    return LengthModel(
        median=arguments["tool_median_s"], sigma=arguments["tool_sigma"], longest=arguments["tool_longest_s"]
    )
