"""From a benchmark's result to the scenarios of its modes, and how far the simulation is from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime_async.bench.measure import speed_of
from slime_async.bench.saturated import Burst, EngineRate, SaturatedEngine, SaturatedLearner
from slime_async.bunches import Bunches
from slime_async.simulate.cluster import simulate
from slime_async.simulate.draws import Draws
from slime_async.simulate.scenario import EngineModel, LearnerModel, LengthModel, Scenario
from slime_async.simulate.sides import Sides

FORCED = "slime_async.actors.workloads:"
"""Sources whose lengths the configuration tells; of others, the measured ones are drawn from"""
AGES_DRAWN = 4096
"""Lengths from which the ages of running requests are estimated"""
MOST_OF_CONTEXT = 0.75
"""Of a step at the mean context, that may be due to context: what a line through noisy bursts may say"""


@dataclass(frozen=True, slots=True)
class Check:
    """One mode, simulated and measured."""

    workload: str
    """Empty where the result has one alone"""
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
    """A mode of ``bench.json``, from the rates that each side reached in the same benchmark: alone, and where they were
    measured, side by side; all at the speed that CPU cores had in the mode. Of the mode's own run it takes how long
    publications took."""
    config, row = result["config"], result["modes"][mode]
    learners, actors = row["learner_devices"], row["actor_devices"]
    speeds = row.get("core_speeds", {})
    sides = Sides.of(result["saturated"], len(learners), speed_of(speeds, actors), speed_of(speeds, learners))
    engine, full = sides.engine, sides.full
    colocated = bool(set(learners) & set(actors))
    arguments = _forced_arguments(config)
    lengths = _lengths(arguments, result)
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
            beside=sides.engine_beside(colocated),
            prefill_fraction=_prefill_fraction(config),
            prefill_wait_s=config.get("actor.prefill_wait_s", 1.0),
            **_decoding(
                engine,
                full,
                _prefill_fraction(config),
                lengths,
                waits="tool_median_s" in arguments,
                pads=config.get("actor.engine") == "embedded",
            ),
        ),
        learner=LearnerModel(
            devices=len(learners),
            token_s=_token_s(sides.learner, row, colocated),
            beside=sides.learner_beside(colocated),
        ),
        colocated=colocated,
        lengths=lengths,
        turns=int(arguments.get("turns", 1)),
        environment_s=_delays(arguments),
        prompt_tokens=engine.total_tokens_per_sample - engine.tokens_per_sample,
        publish_s=_publish_s(result, row) if mode.startswith("one-step-off") else row["publish_s"],
        pause_s=row["pause_s"],
        steps=60,
        warmup_steps=10 + row["max_staleness"],
    )


def _prefill_fraction(config: Mapping[str, Any]) -> float:
    """Only SGLang's requests enter in bunches, and in older results none did."""
    return float(config.get("actor.prefill_fraction", 0.0)) if config.get("actor.engine") == "sglang" else 0.0


def _decoding(
    engine: SaturatedEngine, full: EngineRate, fraction: float, lengths: LengthModel, *, waits: bool, pads: bool
) -> dict[str, Any]:
    """Fields of ``EngineModel``. Two lengths of a burst tell a decoding step, in which nothing enters, and a third what
    longer contexts cost. What a token takes longer in an engine that is kept full, at each of several levels, is what
    entering requests cost: so much each time that any enter, and so much for each of them. Where episodes wait for
    environments (``waits``), only the full engine's time tells that: at lower levels it has idle moments. Results
    without bursts have all of it in the steps.
    """
    if not engine.bursts:
        return {"step_s": tuple((rate.running, rate.running / rate.tokens_per_s) for rate in engine.rates)}
    decoding = EngineModel(pads=pads, **_steps(engine))
    decoded = engine.tokens_per_request - 1  # the first token comes of the prefill
    drawn = np.sort(Draws(lengths, 0).take(AGES_DRAWN))
    shares, costs = [], []
    delivering_s = engine.tokens_per_request * (1 / full.tokens_per_s - engine.step_s(full.running) / full.running)
    for rate in (full,) if waits else (*engine.rates[1:-1], full):
        entering = rate.running / decoded  # requests per step
        alone = (1 - math.exp(-entering)) / entering  # prefills per request, where arrivals are independent
        shares.append(min(alone, 1 / Bunches(fraction, 0.0).size(int(rate.running))))
        bare_s, slope = decoding.step_by_context(round(rate.running))
        step_s = bare_s + slope * steady_context(drawn, rate.running if pads else 1.0)
        spent_s = engine.tokens_per_request / rate.tokens_per_s + (0.0 if rate is full else max(0.0, delivering_s))
        costs.append(max(0.0, spent_s - decoded * step_s / rate.running))
    prefill_s, request_s = _line(shares, costs)
    return {
        "step_s": decoding.step_s,
        "context": decoding.context,
        "context_step_s": decoding.context_step_s,
        "pads": pads,
        "prefill_s": prefill_s,
        "request_s": request_s,
    }


def _steps(engine: SaturatedEngine) -> dict[str, Any]:
    """``step_s``, and where bursts of a third length were made, ``context_step_s``."""
    steps, slopes, context = [], [], 0.0
    for requests, group in groupby(engine.bursts, lambda burst: burst.requests):
        short, long, *longest = sorted(group, key=lambda burst: burst.tokens)
        step_s, context = _between(short, long)
        steps.append((float(requests), step_s))
        for burst in longest:
            far_s, far = _between(long, burst)
            most = MOST_OF_CONTEXT * step_s / context
            slopes.append((float(requests), min(most, max(0.0, (far_s - step_s) / (far - context)))))
    return {"step_s": tuple(steps), "context_step_s": tuple(slopes), "context": context if slopes else 0.0}


def _between(short: Burst, long: Burst) -> tuple[float, float]:
    """Seconds of a step after those of ``short`` up to those of ``long``, and the mean context there."""
    step_s = (long.seconds - short.seconds) / (long.tokens - short.tokens)
    return max(0.0, step_s), (short.tokens + long.tokens) / 2


def steady_context(drawn: NDArray[np.float64], running: float) -> float:
    """The longest context of so many requests that have always been replaced as they ended; of one, the mean context.

    A request that is met has the age x with the density (1 - F(x)) / mean, where F is the distribution of ``drawn``,
    ascending lengths; and the longest of n is below x with the n-th power of that distribution.
    """
    gaps = np.diff(drawn, prepend=0.0)
    beyond = 1 - np.arange(len(drawn)) / len(drawn)
    younger = np.cumsum(gaps * beyond) / drawn.mean()
    before = np.concatenate([[0.0], younger[:-1]])
    return float(np.sum(gaps * (1 - ((before + younger) / 2) ** running)))


def _line(shares: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Slope and offset, neither below 0, of the line with the least squares of relative errors; of one point, the
    offset alone."""
    weights = 1 / np.maximum(costs, 1e-9)
    columns = np.stack([np.asarray(shares), np.ones(len(shares))]) * weights
    fits = [np.array([0.0, weights.sum() / (weights @ weights)])]
    if len(shares) > 1:
        fits.append(np.array([columns[0].sum() / (columns[0] @ columns[0]), 0.0]))
        both = np.linalg.lstsq(columns.T, np.ones(len(shares)), rcond=None)[0]
        fits += [both] if both.min() >= 0 else []
    slope, offset = min(fits, key=lambda fit: float(np.square(fit @ columns - 1).sum()))
    return float(slope), float(offset)


def _publish_s(result: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Without the wait for running episodes, which the simulation makes itself. Older results have both in one: then
    the shortest publication of the modes that do not wait stands for it."""
    if row.get("drain_s") is not None:
        return float(row["publish_s"] - row["drain_s"])
    return float(min(other["publish_s"] for other in result["modes"].values()))


def _token_s(learner: SaturatedLearner | None, row: Mapping[str, Any], colocated: bool) -> float:
    """Alone, as it was measured; on devices that it shares, as it was in the run itself: nobody else computes then."""
    if learner is not None and not colocated:
        return 1 / learner.tokens_per_s
    batches = sum(window["steps"] for window in row["windows"])
    return float(row["train_s"] * batches / sum(window["batch_tokens"] for window in row["windows"]))


def check(result: Mapping[str, Any]) -> list[Check]:
    """Every mode of a benchmark, or of each that a result of several workloads has. Raises ``ValueError`` for what is
    no such result."""
    try:
        return [
            Check(name, mode, simulate(scenario_of(one, mode)).samples_per_s, row["samples_per_s"]["mean"])
            for name, one in result.get("workloads", {"": result}).items()
            for mode, row in one["modes"].items()
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"lacks what slime-async bench writes: {error!r}") from error


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
