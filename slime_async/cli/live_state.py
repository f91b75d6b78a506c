"""What the live view knows: the hub's word of this moment, and what a run's directory tells of the time before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slime_async.cli.progress import TokenRate, who_waits
from slime_async.config import Config
from slime_async.protocol import PeerStatus, Report, RunStatus
from slime_async.telemetry.accounting import Account, accounts
from slime_async.telemetry.jsonl import FollowedLines
from slime_async.telemetry.spans import ProcessRole, read_tracks

REWARDS_KEPT = 120
"""Of the last steps seen, for the small curve"""
WARNINGS_KEPT = 5
WINDOW_S = 60.0
"""How far back the shares of waiting look"""
ACCOUNTING_INTERVAL_S = 5.0
"""Reading spans costs milliseconds per process"""
TAIL_BYTES = 256 << 10
"""Of each process's spans: some two thousand, more than a minute's"""


@dataclass(slots=True)
class Pace:
    """Where a phase is, and when it will be done, from how fast it went so far."""

    name: str = ""
    first_step: int = 0
    since_s: float = 0.0
    step: int = 0
    steps: int = 0

    def update(self, name: str, step: int, steps: int, now_s: float) -> None:
        if name != self.name or step < self.step:
            self.name, self.first_step, self.since_s = name, step, now_s
        self.step, self.steps = step, steps

    def left_s(self, now_s: float) -> float | None:
        """Seconds to go; None before anything was done, or where no end is known."""
        done = self.step - self.first_step
        if done <= 0 or self.steps <= 0:
            return None
        return max(0.0, (self.steps - self.step) * (now_s - self.since_s) / done)


@dataclass(slots=True)
class LiveState:
    """Updated with each status; rendered by ``slime_async.cli.live_view``. Times are the monotonic clock's."""

    config: Config
    directory: Path
    begun_s: float = field(default_factory=time.monotonic)
    now_s: float = 0.0
    status: RunStatus | None = None
    pace: Pace = field(default_factory=Pace)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=REWARDS_KEPT))
    warnings: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=WARNINGS_KEPT))
    accuracy: dict[str, float] = field(default_factory=dict)
    """By evaluation's name, the last source's"""
    generated_per_s: float | None = None
    waiting: str = ""
    waiting_since_s: float = 0.0
    sides: dict[ProcessRole, Account] = field(default_factory=dict)
    _rate: TokenRate = field(default_factory=TokenRate)
    _events: FollowedLines | None = None
    _last_step: int = -1
    _accounted_s: float = float("-inf")

    @property
    def learner(self) -> Report:
        """What it reported last; empty before it connects."""
        return next((p.report for p in self._peers if p.role == "learner"), {})

    @property
    def actors(self) -> list[PeerStatus]:
        return [peer for peer in self._peers if peer.role == "actor"]

    @property
    def queue(self) -> Report:
        return self.status.queue if self.status is not None else {}

    @property
    def phase(self) -> str:
        return str(self.learner.get("phase", "starting"))

    def update(self, status: RunStatus, now_s: float) -> None:
        """Take in the hub's status, and what was written since the last call."""
        self.status, self.now_s = status, now_s
        self.generated_per_s = self._rate.update(status.peers, now_s)
        self._update_pace()
        if (step := int(self.learner.get("step", -1))) != self._last_step and "reward_mean" in self.learner:
            self._last_step = step
            self.rewards.append(float(self.learner["reward_mean"]))
        waiting = who_waits(self.learner, self.queue, self.actors) if self.phase == "rl" else ""
        if waiting != self.waiting:
            self.waiting, self.waiting_since_s = waiting, now_s
        self._follow_events()
        if now_s - self._accounted_s >= ACCOUNTING_INTERVAL_S:
            self._accounted_s = now_s
            end_ns = time.time_ns()
            tracks = read_tracks(self.directory / "spans", lambda _: None, TAIL_BYTES)
            self.sides = accounts(tracks, (end_ns - round(WINDOW_S * 1e9), end_ns))

    @property
    def _peers(self) -> tuple[PeerStatus, ...]:
        return self.status.peers if self.status is not None else ()

    def _update_pace(self) -> None:
        phase, report = self.phase, self.learner
        if phase.startswith("evaluation"):
            total = self.config.evaluation.tasks
            missing = int(self.queue.get("evaluation_missing", 0)) + int(self.queue.get("evaluation_reserved", 0))
            self.pace.update(phase, max(0, total - missing), total, self.now_s)
        else:
            self.pace.update(phase, int(report.get("step", 0)), int(report.get("steps", 0)), self.now_s)

    def _follow_events(self) -> None:
        if self._events is None:
            self._events = FollowedLines(self.directory / "events.jsonl")
        for event in self._events.new():
            self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        match event.get("event"):
            case "warning":
                self.warnings.append({"who": event.get("process"), "text": event.get("text"), "at_s": event["time_s"]})
            case "role_died":
                text = f"died with exit code {event.get('exit_code')}"
                self.warnings.append({"who": event.get("process"), "text": text, "at_s": event["time_s"]})
            case "evaluation":
                name = str(event.get("name"))
                for older in [known for known in self.accuracy if known.startswith(name.rstrip("0123456789"))]:
                    del self.accuracy[older]  # of those on schedule, the latest
                self.accuracy[name] = float(event["accuracy"])
