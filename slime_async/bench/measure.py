"""One mode in numbers, from what its run wrote: metrics, spans, and the lengths that its journal knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from slime_async.bench.modes import Mode
from slime_async.bench.windows import Window, cut
from slime_async.config.schema import BenchConfig
from slime_async.report.run import RunData
from slime_async.telemetry.accounting import COMPUTING, accounts, gate_spans, pieces
from slime_async.telemetry.intervals import Interval, total, union
from slime_async.telemetry.overlap import busy, overlap_fraction
from slime_async.telemetry.spans import ProcessRole, Span, Track

ACCURACY_BATCHES = 4
"""The accuracy at a time is the mean over so many batches: one alone has a standard error of a few percent"""
TIMELINE_S = 16.0
"""What the report shows of each mode"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one mode did in its windows. Fractions are of the windows' time."""

    mode: str
    layout: str
    learner_devices: tuple[int, ...]
    actor_devices: tuple[int, ...]
    engine_ranks: int
    max_staleness: int
    synchronous: bool
    windows: tuple[Window, ...]
    step_s: float
    """Mean, from one step's end to the next's"""
    tokens_per_sample: float
    """Sampled ones"""
    computing: dict[str, float]
    """By device"""
    waiting: dict[str, dict[str, float]]
    """By side, the fraction of its time that each part took (``slime_async.telemetry.accounting``)"""
    generate_s: float
    """Per batch: how long an actor's engine had something to do, mean over the actors"""
    train_s: float
    """Per batch: how long a learner's rank computed, mean over the ranks"""
    publish_s: float
    """Mean of a publication, from its begin until engines use the weights"""
    pause_s: float
    """Of it, engines paused"""
    overlap: float | None
    """Of generation and training: ``slime_async.telemetry.overlap``"""
    staleness_mean: float
    """Over tokens with weight in the loss"""
    staleness_max: int
    trained_tokens_per_s: float
    """Sampled, and with weight in the loss"""
    masked_fraction: float
    """Of sampled tokens, beyond the bound and without weight in the loss"""
    accuracy: tuple[tuple[float, float], ...]
    """(seconds since RL began, mean reward of the last batches)"""
    time_to_target_s: float | None
    lengths: tuple[int, ...]
    """Sampled tokens of each trajectory trained in the windows"""
    deaths: int
    warmup_s: float
    """From RL's begin to the first window"""
    timeline: dict[str, tuple[tuple[float, float, str], ...]]
    """By process: (start, end, part), seconds from the first window's begin"""
    drain_s: float | None = None
    """Of a publication, until nothing ran any more, which only batch boundaries wait for; older results have none"""
    servers: str = ""
    """Which SGLang servers it ran on"""
    core_speeds: dict[str, float] = field(default_factory=dict)
    """By device, where devices are CPU cores (``slime_async.bench.speed``)"""
    running_requests: float | None = None
    """That an engine sampled for at once: mean of what actors told with their heartbeats; older results have none"""

    def speed(self, devices: Iterable[int]) -> float:
        """Mean over these devices; 0 where nobody looked."""
        return speed_of(self.core_speeds, devices)

    @property
    def samples_per_s(self) -> list[float]:
        return [window.samples_per_s for window in self.windows]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Measurement:
        return cls(
            **{
                **plain,
                "windows": tuple(Window(**window) for window in plain["windows"]),
                "accuracy": tuple((x, y) for x, y in plain["accuracy"]),
                **{name: tuple(plain[name]) for name in ("lengths", "learner_devices", "actor_devices")},
                "timeline": {
                    process: tuple((start, end, part) for start, end, part in cuts)
                    for process, cuts in plain["timeline"].items()
                },
            }
        )


def speed_of(core_speeds: Mapping[str, float], devices: Iterable[int]) -> float:
    """The mean over these devices of a ``Measurement`` 's speeds; 0 where nobody looked."""
    return mean(core_speeds[str(device)] for device in devices) if core_speeds else 0.0


def measure(run: RunData, mode: Mode, bench: BenchConfig, lengths: Mapping[int, Sequence[int]]) -> Measurement:
    """Read one run. ``lengths`` are the sampled tokens of every trajectory by the version that it trained.

    Raises ``ValueError`` where there is too little to measure.
    """
    begin_s, batch = run.start_s, run.batch
    if begin_s is None or batch is None or not run.steps:
        raise ValueError(f"{run.path}: nothing was trained")
    windows = cut(run.steps, begin_s, bench.warmup_s, bench.windows, bench.window_s, batch)
    measured = (windows[0].start_s, windows[-1].end_s)
    steps = [step for step in run.steps if measured[0] < step["time_s"] <= measured[1]]
    interval = (int(measured[0] * 1e9), int(measured[1] * 1e9))
    sides = accounts(run.tracks, interval)
    curve = accuracy_curve(run.steps, begin_s)
    trained = sum(step["tokens_trained"] for step in steps)
    publications = [s for t in run.tracks for s in t.spans if s.name == "publish" and _inside(s, interval)]
    pauses = [s for t in run.tracks for s in t.spans if s.name == "weight_sync" and _inside(s, interval)]
    return Measurement(
        mode=mode.name,
        layout=mode.layout,
        learner_devices=mode.learner_devices,
        actor_devices=mode.actor_devices,
        engine_ranks=mode.engine_ranks,
        max_staleness=mode.max_staleness,
        synchronous=mode.synchronous,
        windows=tuple(windows),
        step_s=(measured[1] - measured[0]) / len(steps),
        tokens_per_sample=sum(window.sampled_tokens for window in windows) / sum(w.samples for w in windows),
        computing=device_computing(run.tracks, mode, interval),
        waiting={role: side.fractions for role, side in sides.items()},
        generate_s=_busy_s(run.tracks, "actor", interval) / len(steps),
        train_s=_busy_s(run.tracks, "learner", interval) / len(steps),
        publish_s=_mean_s(publications),
        pause_s=_mean_s(pauses),
        drain_s=_drain_s(run.tracks, publications),
        overlap=_overlap(run.tracks, interval),
        staleness_mean=sum(s["staleness_mean"] * s["tokens_trained"] for s in steps) / max(1.0, trained),
        staleness_max=int(max(step["staleness_max"] for step in steps)),
        trained_tokens_per_s=trained / (measured[1] - measured[0]),
        masked_fraction=1 - trained / max(1.0, sum(step["sampled_tokens"] for step in steps)),
        accuracy=tuple(curve),
        time_to_target_s=_first_at(curve, bench.target_accuracy),
        lengths=tuple(n for step in steps for n in lengths.get(int(step["step"]), ())),
        deaths=run.summary.actor_deaths + run.summary.hub_deaths + run.summary.learner_deaths,
        warmup_s=measured[0] - begin_s,
        timeline=_timeline(run.tracks, interval),
        running_requests=requests_at_once(run.queue, measured, len(mode.actor_devices)),
    )


def device_computing(tracks: Sequence[Track], mode: Mode, interval: Interval) -> dict[str, float]:
    """The fraction of its time in which anybody on a device computed."""
    names = {device: [f"learner-{rank}"] for rank, device in enumerate(mode.learner_devices)}
    names[mode.learner_devices[0]] = ["learner"]
    for index, device in enumerate(mode.actor_devices):
        names.setdefault(device, []).append(f"actor-{index}")
    fractions = {}
    for device, processes in sorted(names.items()):
        spans = [cut for track in tracks if track.process in processes for cut in _computing(track, tracks, interval)]
        fractions[str(device)] = total(union(spans)) / (interval[1] - interval[0])
    return fractions


def requests_at_once(queue: Sequence[dict[str, Any]], measured: tuple[float, float], engines: int) -> float | None:
    """Of an engine, the mean over the lines of ``queue.jsonl`` between two times; older releases' lines say nothing."""
    lines = [line for line in queue if measured[0] <= line["time_s"] < measured[1] and "running_requests" in line]
    return mean(line["running_requests"] for line in lines) / engines if lines else None


def accuracy_curve(steps: Sequence[dict[str, Any]], begin_s: float) -> list[tuple[float, float]]:
    rewards = [float(step["reward_mean"]) for step in steps]
    return [
        (float(steps[i]["time_s"]) - begin_s, sum(rewards[i + 1 - ACCURACY_BATCHES : i + 1]) / ACCURACY_BATCHES)
        for i in range(ACCURACY_BATCHES - 1, len(steps))
    ]


def _first_at(curve: Sequence[tuple[float, float]], target: float | None) -> float | None:
    return next((at for at, accuracy in curve if target is not None and accuracy >= target), None)


def _computing(track: Track, tracks: Sequence[Track], interval: Interval) -> list[Interval]:
    return [(start, end) for start, end, part in pieces(track, gate_spans(tracks), interval) if part == COMPUTING]


def _busy_s(tracks: Sequence[Track], role: ProcessRole, interval: Interval) -> float:
    """Mean over the side's processes."""
    seconds = [total(_computing(track, tracks, interval)) / 1e9 for track in tracks if track.role == role]
    return sum(seconds) / max(1, len(seconds))


def _overlap(tracks: Sequence[Track], interval: Interval) -> float | None:
    spans = [span for track in tracks for span in track.spans]
    return overlap_fraction(busy(spans, "generate", interval), busy(spans, "train", interval))


def _timeline(tracks: Sequence[Track], interval: Interval) -> dict[str, tuple[tuple[float, float, str], ...]]:
    shown = (interval[0], min(interval[1], interval[0] + int(TIMELINE_S * 1e9)))
    return {
        track.process: tuple(
            ((start - shown[0]) / 1e9, (end - shown[0]) / 1e9, part)
            for start, end, part in pieces(track, gate_spans(tracks), shown)
        )
        for track in tracks
        if track.role != "hub"
    }


def _inside(span: Span, interval: Interval) -> bool:
    return interval[0] <= span.start_ns < interval[1]


def _drain_s(tracks: Sequence[Track], publications: Sequence[Span]) -> float:
    """A publication drains first, then it asks every engine to prepare."""
    prepared = {s.args["version"]: s.start_ns for t in tracks for s in t.spans if s.name == "prepare_sync"}
    waits = [prepared[s.args["version"]] - s.start_ns for s in publications if s.args["version"] in prepared]
    return sum(waits) / 1e9 / max(1, len(waits))


def _mean_s(spans: Sequence[Span]) -> float:
    return sum(span.end_ns - span.start_ns for span in spans) / 1e9 / max(1, len(spans))
