"""All modes against each other, and against what the same devices could do at best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slime_async.bench.intervals import Estimate, rate, ratio
from slime_async.bench.measure import Measurement
from slime_async.bench.modes import Mode
from slime_async.bench.saturated import EngineRate, SaturatedEngine, SaturatedLearner, SideBySide
from slime_async.telemetry.accounting import COMPUTING, PARTS, UNACCOUNTED

MODERATE_STALENESS = 4
"""The headline takes the fastest asynchronous mode up to this η"""


@dataclass(frozen=True, slots=True)
class Ideal:
    """Seconds per batch of each side alone on its devices, for the tokens that a mode trained.

    A learner on more devices than it was measured on is taken to scale perfectly, and either side to be as much faster
    or slower as its cores were in the mode, where that is known.
    """

    generate_s: float
    train_s: float

    @property
    def overlapped_s(self) -> float:
        """Neither side ever waits for the other."""
        return max(self.generate_s, self.train_s)

    @property
    def alternating_s(self) -> float:
        """Only one side works at a time."""
        return self.generate_s + self.train_s

    @property
    def bottleneck(self) -> str:
        return "generation" if self.generate_s >= self.train_s else "training"


@dataclass(frozen=True, slots=True)
class Row:
    """One mode, compared."""

    measurement: Measurement
    ideal: Ideal
    samples_per_s: Estimate
    over_best_sync: Estimate

    @property
    def of_ideal(self) -> float:
        """What one side alone needs at least, over what a batch took: the bottleneck's tokens/s over its saturated."""
        return self.ideal.overlapped_s / self.measurement.step_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of a benchmark."""

    rows: tuple[Row, ...]
    engine: SaturatedEngine
    learners: dict[int, SaturatedLearner]
    """By devices"""
    delivering: EngineRate | None
    """One engine alone, its actor delivering to a hub"""
    side_by_side: dict[int, SideBySide]
    """By the learner's devices"""
    engines_together: EngineRate | None
    """One engine while engines are full on all devices that a colocated mode shares"""

    def row(self, mode: str) -> Row:
        return next(row for row in self.rows if row.measurement.mode == mode)

    @property
    def best_sync(self) -> Row | None:
        return max((row for row in self.rows if row.measurement.synchronous), key=_speed, default=None)

    @property
    def best_async(self) -> Row | None:
        """Of moderate staleness."""
        rows = [row for row in self.rows if 0 < row.measurement.max_staleness <= MODERATE_STALENESS]
        return max((row for row in rows if row.measurement.mode.startswith("async")), key=_speed, default=None)

    def figures(self) -> dict[str, float | str]:
        """The headline; empty unless both a synchronous and an asynchronous mode were measured."""
        sync, best = self.best_sync, self.best_async
        if sync is None or best is None:
            return {}
        bound = sync.measurement.step_s / best.ideal.overlapped_s  # batches are equally large in all modes
        return {
            "async_over_best_sync": best.over_best_sync.mean,
            "async_over_best_sync_half_width": best.over_best_sync.half_width,
            "trained_tokens_over_best_sync": (
                best.measurement.trained_tokens_per_s / sync.measurement.trained_tokens_per_s
            ),
            "bound_of_async_over_best_sync": bound,
            "learner_wait_fraction": waiting_fraction(best.measurement, "learner"),
            "bottleneck_busy_fraction": best.of_ideal,
            "of_ideal": best.over_best_sync.mean / bound,
            "bottleneck": best.ideal.bottleneck,
            "best_async_mode": best.measurement.mode,
            "best_sync_mode": sync.measurement.mode,
        }

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "saturated": {
                "engine": self.engine.to_plain() | {"tokens_per_s": self.engine.tokens_per_s},
                "learner": {
                    str(n): learner.to_plain() | {"tokens_per_s": learner.tokens_per_s}
                    for n, learner in self.learners.items()
                },
                "delivering": asdict(self.delivering) if self.delivering is not None else None,
                "side_by_side": {str(n): both.to_plain() for n, both in self.side_by_side.items()},
                "engines_together": asdict(self.engines_together) if self.engines_together is not None else None,
            },
            "lengths": quantiles([n for row in self.rows for n in row.measurement.lengths]),
            "modes": {row.measurement.mode: _plain_row(row) for row in self.rows},
        }


def compare(
    modes: Sequence[Mode],
    measurements: Sequence[Measurement],
    engine: SaturatedEngine,
    learners: Mapping[int, SaturatedLearner],
    delivering: EngineRate | None = None,
    side_by_side: Mapping[int, SideBySide] | None = None,
    engines_together: EngineRate | None = None,
) -> Comparison:
    """Rows in the order of ``measurements``, each of the mode of its name."""
    by_name = {mode.name: mode for mode in modes}
    speeds = [rate_of(measurement, "samples") for measurement in measurements]
    sync = [speed for speed, m in zip(speeds, measurements, strict=True) if m.synchronous]
    best = max(sync, key=lambda speed: speed.mean, default=Estimate(math.nan, math.nan))
    rows = [
        Row(m, ideal_of(by_name[m.mode], m, engine, learners, delivering), speed, ratio(speed, best))
        for speed, m in zip(speeds, measurements, strict=True)
    ]
    return Comparison(tuple(rows), engine, dict(learners), delivering, dict(side_by_side or {}), engines_together)


def ideal_of(
    mode: Mode,
    measured: Measurement,
    engine: SaturatedEngine,
    learners: Mapping[int, SaturatedLearner],
    delivering: EngineRate | None = None,
) -> Ideal:
    """An engine alone is as fast as it was at its fastest, be it in the hands of an actor that was ``delivering``."""
    steps = sum(window.steps for window in measured.windows)
    sampled = sum(window.sampled_tokens for window in measured.windows) / steps
    computed = sum(window.batch_tokens for window in measured.windows) / steps
    devices = len(mode.learner_devices)
    learner = learners.get(devices) or max(learners.values(), key=lambda one: one.devices)
    learner = learner.at(measured.speed(mode.learner_devices))
    rates = (*engine.rates, delivering) if delivering else engine.rates
    fastest = max(rate.at(measured.speed(mode.actor_devices)).tokens_per_s for rate in rates)
    return Ideal(
        generate_s=sampled / (len(mode.actor_devices) * fastest),
        train_s=computed / (learner.tokens_per_s * devices / learner.devices),
    )


def rate_of(measured: Measurement, what: str) -> Estimate:
    """Per second; ``what`` is a count of ``Window``."""
    return rate([getattr(w, what) for w in measured.windows], [w.seconds for w in measured.windows])


def waiting_fraction(measured: Measurement, side: str) -> float:
    return sum(share for part, share in measured.waiting[side].items() if part not in (COMPUTING, UNACCOUNTED))


def causes(measured: Measurement, side: str, least: float = 0.01) -> str:
    """What a side waited for, the largest first."""
    parts = measured.waiting.get(side, {})
    shown = [(share, part) for part, share in parts.items() if part not in (COMPUTING, UNACCOUNTED) and share >= least]
    return ", ".join(f"{PARTS[part].partition(':')[0].lower()} {share:.0%}" for share, part in sorted(shown)[::-1])


HEADS = (
    "mode",
    "η",
    "devices",
    "samples/s",
    "× best sync",
    "sampled tokens/s",
    "… not masked",
    "learner tokens/s",
    "s/batch",
    "max / sum, alone",
    "of max",
    "actors compute",
    "requests at once",
    "learner computes",
    "actors wait for",
    "learner waits for",
    "staleness, mean (max)",
    "masked",
)


def cells(row: Row) -> tuple[str, ...]:
    """As ``HEADS``."""
    m = row.measurement
    sampled, computed = rate_of(m, "sampled_tokens").mean, rate_of(m, "batch_tokens").mean
    return (
        m.mode,
        str(m.max_staleness),
        m.layout,
        str(row.samples_per_s),
        f"{row.over_best_sync.mean:.2f}",
        f"{sampled:,.0f}",
        f"{m.trained_tokens_per_s:,.0f}",
        f"{computed:,.0f}",
        f"{m.step_s:.2f}",
        f"{row.ideal.overlapped_s:.2f} / {row.ideal.alternating_s:.2f}",
        f"{row.of_ideal:.0%}",
        f"{m.waiting.get('actor', {}).get(COMPUTING, 0):.0%}",
        "–" if m.running_requests is None else f"{m.running_requests:.0f}",
        f"{m.waiting.get('learner', {}).get(COMPUTING, 0):.0%}",
        causes(m, "actor") or "–",
        causes(m, "learner") or "–",
        f"{m.staleness_mean:.2f} ({m.staleness_max})",
        f"{m.masked_fraction:.1%}",
    )


def table(comparison: Comparison, target: float | None = None) -> str:
    """Markdown."""
    heads, rows = list(HEADS), [list(cells(row)) for row in comparison.rows]
    if target is not None:
        heads.append(f"s to {target:g}")
        for cell, row in zip(rows, comparison.rows, strict=True):
            at = row.measurement.time_to_target_s
            cell.append("–" if at is None else f"{at:.0f}")
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quantiles(lengths: Sequence[int], count: int = 256) -> list[int]:
    """So many values that stand for the distribution."""
    ordered = sorted(lengths)
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)] if ordered else []


def _speed(row: Row) -> float:
    return row.samples_per_s.mean


def _plain_row(row: Row) -> dict[str, Any]:
    plain = row.measurement.to_plain()
    for bulky in ("lengths", "timeline"):
        del plain[bulky]
    return {
        **plain,
        "samples_per_s": asdict(row.samples_per_s) | {"windows": row.measurement.samples_per_s},
        "over_best_sync": asdict(row.over_best_sync),
        "ideal": asdict(row.ideal) | {"max_s": row.ideal.overlapped_s, "sum_s": row.ideal.alternating_s},
        "of_ideal": row.of_ideal,
        "learner_wait_fraction": waiting_fraction(row.measurement, "learner"),
        "actor_wait_fraction": waiting_fraction(row.measurement, "actor"),
    }
