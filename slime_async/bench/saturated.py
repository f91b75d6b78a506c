"""What each side reaches, alone and side by side: an engine that is kept full, a learner that is fed from memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from slime_async.bench.speed import times_as_fast


@dataclass(frozen=True, slots=True)
class EngineRate:
    """One engine with a fixed number of episodes."""

    running: float
    """Requests that it decoded at once, mean"""
    tokens_per_s: float
    speed: float = 0.0
    """Of its cores meanwhile (``slime_async.bench.speed``); 0 where nobody looked, as on GPUs"""

    def at(self, speed: float) -> EngineRate:
        """As it would be at this speed of its cores."""
        return replace(self, tokens_per_s=self.tokens_per_s * times_as_fast(speed, self.speed))


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests of one length, handed at once to an engine that has nothing else: nothing enters while they decode."""

    requests: int
    tokens: int
    """That each samples"""
    seconds: float
    """Until the last is done; the median of several"""
    speed: float = 0.0
    """As an ``EngineRate``'s"""

    def at(self, speed: float) -> Burst:
        """As it would be at this speed of its cores."""
        return replace(self, seconds=self.seconds / times_as_fast(speed, self.speed))


@dataclass(frozen=True, slots=True)
class SaturatedEngine:
    """One engine, from a single request to more than it takes at once."""

    rates: tuple[EngineRate, ...]
    """By requests, ascending; the last is what the engine reaches when it is full"""
    tokens_per_sample: float
    """Sampled"""
    total_tokens_per_sample: float
    """With prompts and what environments inserted"""
    tokens_per_request: float = 0.0
    """Sampled in one turn; 0 in older results"""
    bursts: tuple[Burst, ...] = ()
    """Two lengths for each number of requests, and a third where answers differ much; older results have none"""

    @property
    def tokens_per_s(self) -> float:
        return max(rate.tokens_per_s for rate in self.rates)

    def at(self, speed: float) -> SaturatedEngine:
        """As it would be at this speed of its cores."""
        rates = tuple(rate.at(speed) for rate in self.rates)
        bursts = tuple(burst.at(speed) for burst in self.bursts)
        return replace(self, rates=rates, bursts=bursts)

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SaturatedEngine:
        rates = tuple(EngineRate(**rate) for rate in plain["rates"])
        bursts = tuple(Burst(**burst) for burst in plain.get("bursts", ()))
        return cls(**{**_known(cls, plain), "rates": rates, "bursts": bursts})

    @property
    def full(self) -> EngineRate:
        """With as many requests as it takes."""
        return max(self.rates, key=lambda rate: rate.running)

    def step_s(self, running: float) -> float:
        """Seconds of one decoding step with so many requests, between and beyond the measured ones in a line."""
        points = [(rate.running, rate.running / rate.tokens_per_s) for rate in self.rates]
        return interpolate(points, running)


@dataclass(frozen=True, slots=True)
class SaturatedLearner:
    """A learner that never waits: forward, backward, optimizer, and the copy of the weights."""

    devices: int
    batch_s: float
    """Per batch"""
    batch_tokens: float
    """Per batch, prompts included"""
    speed: float = 0.0
    """As an ``EngineRate``'s"""

    def at(self, speed: float) -> SaturatedLearner:
        """As it would be at this speed of its cores."""
        return replace(self, batch_s=self.batch_s / times_as_fast(speed, self.speed))

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SaturatedLearner:
        return cls(**_known(cls, plain))

    @property
    def tokens_per_s(self) -> float:
        return self.batch_tokens / self.batch_s

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """An engine and a learner, both saturated at the same time: what they take from each other on one machine."""

    engine_tokens_per_s: float
    """Its actor delivering to a hub"""
    learner_tokens_per_s: float
    engine_speed: float = 0.0
    learner_speed: float = 0.0
    """As an ``EngineRate``'s"""

    def at(self, engine_speed: float, learner_speed: float) -> SideBySide:
        """As it would be at these speeds of their cores."""
        return replace(
            self,
            engine_tokens_per_s=self.engine_tokens_per_s * times_as_fast(engine_speed, self.engine_speed),
            learner_tokens_per_s=self.learner_tokens_per_s * times_as_fast(learner_speed, self.learner_speed),
        )

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


def _known(cls: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that a result has: it has others beside them, and older ones lack some."""
    return {field.name: plain[field.name] for field in fields(cls) if field.name in plain}


def rate_between(batches: Sequence[tuple[float, float]], began_s: float, ended_s: float) -> float:
    """Tokens per second of a learner; ``batches`` are (end, tokens), one after the other."""
    done, points = 0.0, []
    for end, tokens in batches:
        done += tokens
        points.append((end, done))
    return (interpolate(points, ended_s) - interpolate(points, began_s)) / (ended_s - began_s)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through ``points`` (ascending in x), the outer pieces prolonged; flat for a single point."""
    if len(points) == 1:
        return points[0][1]
    i = min(max(1, bisect_left([point[0] for point in points], x)), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
