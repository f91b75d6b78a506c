"""What is simulated. Every rate is an input: measured by ``slime-async bench``, or assumed and then said so."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from slime_async.bench.saturated import interpolate
from slime_async.config.base import Section
from slime_async.queue.limits import QueueLimits


class LengthModel(Section):
    """Log-normal, cut off: of sampled tokens in a turn, or of seconds."""

    median: PositiveFloat = 512.0
    """Half are below"""
    sigma: NonNegativeFloat = 0.9
    """Of the logarithm; 0 makes all alike"""
    longest: PositiveFloat = 8192.0
    """Longer ones are cut off here"""
    measured: tuple[int, ...] = ()
    """Draw from these instead"""


class EngineModel(Section):
    """One engine."""

    devices: PositiveInt = 1
    """That it takes"""
    max_running: PositiveInt = 128
    """Requests decoded at once; more wait"""
    step_s: tuple[tuple[float, float], ...] = ((1.0, 0.006), (128.0, 0.012))
    """(requests, seconds of a decoding step), ascending; between them, and beyond, in a line"""
    context: NonNegativeFloat = 0.0
    """Tokens that requests have sampled so far where ``step_s`` holds"""
    context_step_s: tuple[tuple[float, float], ...] = ()
    """(requests, seconds that a step takes longer for each token more), ascending; none: context costs nothing"""
    pads: bool = False
    """The context is that of the longest request, to which an engine pads the others, and rows of requests that have
    ended are computed on for a while (``slime_async.rows``); else it is their mean, and there are no such rows"""
    prefill_s: NonNegativeFloat = 0.0
    """That everything stands still when requests enter, however many enter at the same step"""
    request_s: NonNegativeFloat = 0.0
    """More for each of them. With either, the first token comes of it, without a decoding step"""
    prefill_fraction: float = Field(0.0, ge=0, le=0.5)
    """As actor.prefill_fraction: requests enter in bunches of this fraction of those inside"""
    prefill_wait_s: PositiveFloat = 1.0
    """As actor.prefill_wait_s"""
    beside: float = Field(1.0, ge=1)
    """How many times as long all of this takes while all other devices compute; in proportion while some do"""
    mean_time_between_failures_s: PositiveFloat | None = None
    """Of one engine; its requests are lost and granted again"""
    restart_s: PositiveFloat = 90.0
    """From a failure until it serves again"""

    @property
    def prefills(self) -> bool:
        """Whether prefill is told apart from decoding."""
        return self.prefill_s + self.request_s > 0

    def step_with(self, running: int) -> float:
        """Seconds, where ``step_s`` holds."""
        return max(1e-9, interpolate(self.step_s, float(running)))

    def step_by_context(self, running: int) -> tuple[float, float]:
        """Seconds of a step without any context, and more for each token of it."""
        slope = max(0.0, interpolate(self.context_step_s, float(running))) if self.context_step_s else 0.0
        return max(1e-9, self.step_with(running) - slope * self.context), slope


class LearnerModel(Section):
    """The learner."""

    devices: PositiveInt = 1
    """That it takes"""
    fixed_s: NonNegativeFloat = 0.0
    """Per batch, whatever its size: optimizer, snapshot, commit"""
    token_s: PositiveFloat = 2e-5
    """Per token of a batch, on all its devices"""
    beside: float = Field(1.0, ge=1)
    """How many times as long a batch takes while all engines compute; in proportion while some do"""


class Scenario(Section):
    """A cluster, a workload and a way of training."""

    name: str = "scenario"
    """In the output"""
    groups: PositiveInt = 32
    """Per batch"""
    group_size: PositiveInt = 8
    """n"""
    max_staleness: int = Field(2, ge=0)
    """η"""
    on_stale: Literal["mask", "drop", "wait", "train"] = "mask"
    """As staleness.on_stale"""
    publish: Literal["in_flight", "batch_boundary"] = "in_flight"
    """As weights.publish"""
    queue_trajectories: PositiveInt | None = None
    """As batch.queue_trajectories"""
    engines: PositiveInt = 1
    """Each with an actor of its own"""
    slots: PositiveInt = 128
    """Episodes at once in one actor"""
    engine: EngineModel = EngineModel()
    """Of all engines"""
    learner: LearnerModel = LearnerModel()
    """There is one"""
    colocated: bool = False
    """Engines and learner are on the same devices, in turns; needs η = 0"""
    lengths: LengthModel = LengthModel()
    """Sampled tokens of a turn"""
    prompt_tokens: NonNegativeFloat = 0.0
    """Per trajectory, of everything that is not sampled"""
    turns: PositiveInt = 1
    """Per episode"""
    environment_s: LengthModel | None = None
    """Between two turns; the engine is free meanwhile"""
    delivery_s: NonNegativeFloat = 0.002
    """From an episode's end until the hub has it"""
    publish_s: NonNegativeFloat = 0.05
    """From a step's end until engines use its weights"""
    pause_s: NonNegativeFloat = 0.02
    """The last part of it, in which engines stand still"""
    steps: PositiveInt = 40
    """Batches to simulate"""
    warmup_steps: PositiveInt = 10
    """Of them, not counted"""
    seed: int = 0
    """Of lengths, delays and failures"""

    @model_validator(mode="after")
    def _check(self) -> Scenario:
        if self.colocated and self.max_staleness:
            raise ValueError("colocated = true needs max_staleness = 0: the devices either generate or train")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} leaves nothing of steps = {self.steps} to count")
        return self

    @property
    def batch(self) -> int:
        """B"""
        return self.groups * self.group_size

    @property
    def devices(self) -> int:
        engines = self.engines * self.engine.devices
        return max(engines, self.learner.devices) if self.colocated else engines + self.learner.devices

    def limits(self) -> QueueLimits:
        return QueueLimits(
            group_size=self.group_size,
            groups_per_batch=self.groups,
            max_staleness=self.max_staleness,
            on_stale=self.on_stale,
            queue_trajectories=self.queue_trajectories or (self.max_staleness + 1) * self.batch,
            queue_bytes=1 << 62,
            max_trajectory_bytes=1,
        )
