"""The fairness contract: what must be the same for all modes, checked, and said sentence by sentence."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from slime_async.bench.intervals import same_distribution
from slime_async.bench.measure import Measurement
from slime_async.bench.modes import VARIED, Mode, differences

ALARM_P = 0.001
"""Of the two-sample test: with some twenty comparisons of fair modes, one in fifty benchmarks would raise it"""
SPEED_TOLERANCE = 0.1
"""By which a mode's cores may differ from the usual: a shared machine is not always as fast"""
DIGEST_BYTES = 1 << 20
"""Read at a time"""


@dataclass(frozen=True, slots=True)
class Clause:
    """One thing that a fair comparison needs."""

    text: str
    holds: bool
    detail: str

    def __str__(self) -> str:
        return f"[{'ok' if self.holds else 'BROKEN'}] {self.text}: {self.detail}"


def check_before(modes: Sequence[Mode], configs: Mapping[str, dict[str, Any]], checkpoint: Path) -> list[Clause]:
    """What can be said before anything ran. ``configs`` are flattened, by mode."""
    devices = {mode.name: mode.devices for mode in modes}
    first = next(iter(configs))
    departures = {name: differences(configs[first], config) for name, config in configs.items()}
    differing = sorted({key for keys in departures.values() for key in keys})
    used = sorted(set(devices.values()))
    get = configs[first].get
    return [
        Clause("every mode has the same devices", len(used) == 1, f"{len(used[0])} of them: {list(used[0])}"),
        Clause(
            "configurations differ only in what a mode is",
            not differing,
            f"also in {', '.join(differing)}" if differing else f"only in {', '.join(VARIED)}",
        ),
        Clause(
            "same model, tasks, seed",
            not differing,
            f"{digest_of(checkpoint)[:12]} (SHA-256 of the checkpoint), seed {get('run.seed')}, batches of "
            f"{get('batch.groups')} × {get('batch.group_size')}",
        ),
        Clause(
            "same engine settings",
            not any(key.startswith(("actor.", "sglang.", "sampling.")) for key in differing),
            f"each engine: {get('actor.engine')}, {get('actor.max_running_requests')} requests at once",
        ),
    ]


def check_after(measurements: Sequence[Measurement], failed: Sequence[str] = ()) -> list[Clause]:
    """What the measurements say; ``failed`` are modes that have none."""
    pooled = {m.mode: m.lengths for m in measurements}
    worst, pair = 1.0, ("", "")
    names = list(pooled)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            p = same_distribution(pooled[one], pooled[other])
            if p < worst:
                worst, pair = p, (one, other)
    means = ", ".join(f"{m.mode} {m.tokens_per_sample:.1f}" for m in measurements)
    clauses = [
        Clause(
            "lengths come from one distribution",
            worst >= ALARM_P,
            f"smallest p of the two-sample tests {worst:.3g} ({' against '.join(pair)}); tokens per sample: {means}",
        ),
        Clause(
            "warm-up is not counted",
            all(m.warmup_s > 0 for m in measurements),
            f"windows begin {min(m.warmup_s for m in measurements):.0f} to "
            f"{max(m.warmup_s for m in measurements):.0f} s after RL's begin",
        ),
        Clause(
            "equally long windows",
            True,
            f"{min(len(m.windows) for m in measurements)} to {max(len(m.windows) for m in measurements)} a mode, "
            f"{sum(w.seconds for m in measurements for w in m.windows) / sum(len(m.windows) for m in measurements):.0f}"
            " s on average, each of whole batches",
        ),
        Clause(
            "nothing died", not any(m.deaths for m in measurements), f"{sum(m.deaths for m in measurements)} deaths"
        ),
    ]
    clauses.append(Clause("every mode ran", not failed, f"failed: {', '.join(failed)}" if failed else "none failed"))
    if speeds := relative_speeds(measurements):
        clauses.append(_equally_fast(speeds))
    servers = sorted({measurement.servers for measurement in measurements} - {""})
    if servers:
        clauses.append(Clause("the same warm servers for all modes", len(servers) == 1, "; ".join(servers)))
    return clauses


def relative_speeds(measurements: Sequence[Measurement]) -> dict[str, float]:
    """By mode: how fast its cores were beside the median of all modes. Empty where that is not known of each."""
    speeds = {m.mode: m.speed(map(int, m.core_speeds)) for m in measurements}
    if not all(speeds.values()):
        return {}
    usual = median(speeds.values())
    return {mode: speed / usual for mode, speed in speeds.items()}


def _equally_fast(speeds: Mapping[str, float]) -> Clause:
    return Clause(
        "the cores were equally fast in all modes",
        max(abs(speed - 1) for speed in speeds.values()) <= SPEED_TOLERANCE,
        f"beside their median, of which they may be {SPEED_TOLERANCE:.0%} away: "
        + ", ".join(f"{mode} {speed:.2f}" for mode, speed in speeds.items()),
    )


def digest_of(checkpoint: Path) -> str:
    """SHA-256 over a checkpoint's weights, shard by shard."""
    digest = hashlib.sha256()
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with shard.open("rb") as file:
            while block := file.read(DIGEST_BYTES):
                digest.update(block)
    return digest.hexdigest()
