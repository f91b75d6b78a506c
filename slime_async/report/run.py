"""What a report reads of one run: everything that is there, finished or in progress, whole or damaged."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slime_async.telemetry.intervals import Interval
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.metrics import read_metrics
from slime_async.telemetry.overlap import rl_phase
from slime_async.telemetry.spans import Track, read_tracks
from slime_async.telemetry.summary import Summary, summary_of

Record = dict[str, Any]
Points = list[tuple[float, float]]
"""(x, y), ascending in x"""


@dataclass(frozen=True, slots=True)
class RunData:
    """One run directory, in memory."""

    path: Path
    label: str
    """Its directory's name; unique among the runs of a report"""
    summary: Summary
    steps: list[Record]
    """RL's lines of ``metrics.jsonl``"""
    queue: list[Record]
    events: list[Record]
    tracks: list[Track]
    config_text: str
    environment: Record
    problems: list[str]
    """What could not be read"""

    @property
    def config(self) -> dict[str, Any]:
        """By dotted key; empty where there is none."""
        try:
            return flatten(tomllib.loads(self.config_text))
        except tomllib.TOMLDecodeError:
            return {}

    @property
    def rl_phase(self) -> Interval | None:
        return rl_phase([span for track in self.tracks for span in track.spans])

    @property
    def start_s(self) -> float | None:
        """Unix time from which wall-clock time is counted: RL's begin, else the first thing known."""
        begun = [e["time_s"] for e in self.events if e.get("event") == "phase" and e.get("name") == "rl"]
        known = begun or [e["time_s"] for e in self.events[:1]] or [line["time_s"] for line in self.steps[:1]]
        return known[0] if known else None

    @property
    def batch(self) -> int | None:
        """Trajectories per batch, B."""
        groups, size = self.config.get("batch.groups"), self.config.get("batch.group_size")
        return groups * size if isinstance(groups, int) and isinstance(size, int) else None

    def by_step(self, metric: str) -> Points:
        """A metric over the step that it belongs to."""
        return [(float(line["step"]), float(line[metric])) for line in self.steps if metric in line]

    def by_time(self, metric: str) -> Points:
        """A metric over minutes since RL's begin."""
        return [(self._minutes(line), float(line[metric])) for line in self.steps if metric in line]

    def queue_by_time(self, name: str) -> Points:
        """One of the queue's statistics over minutes since RL's begin."""
        return [(self._minutes(line), float(line[name])) for line in self.queue if name in line]

    def accuracy_by_step(self) -> Points:
        """Every evaluation of the trained weights over its version; of several sources, each."""
        return sorted((float(e["version"]), float(e["accuracy"])) for e in self._evaluations() if "version" in e)

    def accuracy_by_time(self) -> Points:
        return sorted((self._minutes(e), float(e["accuracy"])) for e in self._evaluations())

    def staleness_histogram(self) -> dict[int, float]:
        """Share of the run's sampled tokens by age in versions."""
        tokens: dict[int, float] = {}
        for line in self.steps:
            for name, value in line.items():
                if name.startswith("staleness/"):
                    age = int(name.partition("/")[2])
                    tokens[age] = tokens.get(age, 0.0) + value
        total = sum(tokens.values())
        return {age: tokens[age] / total for age in sorted(tokens)} if total else {}

    def warnings(self) -> list[Record]:
        return [event for event in self.events if event.get("event") in ("warning", "role_died")]

    def _evaluations(self) -> list[Record]:
        """Of the policy itself: the supervised control is another model."""
        return [e for e in self.events if e.get("event") == "evaluation" and e.get("name") != "supervised_only"]

    def _minutes(self, record: Record) -> float:
        return (float(record["time_s"]) - (self.start_s or 0.0)) / 60


def read_run(path: Path) -> RunData:
    """Read what is there. Raises ``FileNotFoundError`` where there is no run at all."""
    if not any((path / name).exists() for name in ("config.toml", "events.jsonl", "metrics.jsonl", "spans")):
        raise FileNotFoundError(f"{path} is no run directory: it has neither config.toml nor metrics.jsonl")
    problems: list[str] = []
    steps = [line for line in read_metrics(path / "metrics.jsonl", problem=problems.append) if "time_s" in line]
    events = [event for event in _timed(path / "events.jsonl", problems) if "event" in event]
    tracks = read_tracks(path / "spans", problems.append)
    return RunData(
        path=path,
        label=path.resolve().name,
        summary=summary_of(events, steps, tracks),
        steps=steps,
        queue=_timed(path / "queue.jsonl", problems),
        events=events,
        tracks=tracks,
        config_text=_text(path / "config.toml", problems),
        environment=_json(path / "environment.json", problems),
        problems=problems,
    )


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Several, each with a label of its own: directories of one name are told apart by their paths."""
    runs = [read_run(path) for path in paths]
    labels = Counter(run.label for run in runs)
    return [replace(run, label=str(run.path)) if labels[run.label] > 1 else run for run in runs]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _timed(path: Path, problems: list[str]) -> list[Record]:
    return [line for line in read_jsonl(path, problems.append) if isinstance(line.get("time_s"), int | float)]


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
        return ""


def _json(path: Path, problems: list[str]) -> Record:
    text = _text(path, problems)
    try:
        loaded = json.loads(text) if text else {}
    except ValueError as error:
        problems.append(f"{path.name} is not JSON: {error}")
        return {}
    return loaded if isinstance(loaded, dict) else {}
