"""One line every few seconds while a run goes on, from what the hub knows of everybody.

    step 17/200 | reward 0.412 | generate 11.8k tok/s, train 9.3k tok/s | staleness 0.94 max 2/2 |
    queue 128/768 | learner waits for actors

What the roles report with their heartbeats (``protocol.Report``), besides ``QueueStatistics`` from the hub itself:

=================  ========  =============================================================================
key                role      meaning
=================  ========  =============================================================================
phase              learner   starting, loading, warm_start, evaluation_before, control, rl, evaluation_after, saving
step, steps        learner   of this phase
activity           learner   lease, train, publish: what it does now
metrics' names     learner   of the last step (``slime_async.telemetry.metrics``)
generated_tokens   actors    since the actor's start
running_requests   actors    in its engine now
=================  ========  =============================================================================
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from slime_async.protocol import PeerStatus, Report, RunStatus

PHASES = {
    "starting": "starting",
    "loading": "loading the model",
    "warm_start": "warm start",
    "control": "supervised control",
    "evaluation_before": "evaluation before RL",
    "evaluation_after": "evaluation after RL",
    "saving": "saving",
}
"""Phases other than RL, in words"""


@dataclass(slots=True)
class TokenRate:
    """Tokens per second of all actors together, from their counters; an actor that starts anew counts from 0."""

    _seen: dict[str, int] = field(default_factory=dict)
    _time_s: float | None = None

    def update(self, peers: tuple[PeerStatus, ...], now_s: float) -> float | None:
        """Since the last call; None at the first."""
        counts = {p.name: int(p.report.get("generated_tokens", 0)) for p in peers if p.role == "actor"}
        new = sum(max(0, count - self._seen.get(name, 0)) for name, count in counts.items())
        elapsed = None if self._time_s is None else now_s - self._time_s
        self._seen, self._time_s = counts, now_s
        return new / elapsed if elapsed else None


def progress_line(status: RunStatus, max_staleness: int | None, generated_tokens_per_s: float | None) -> str:
    """What to show of this moment."""
    actors = [peer for peer in status.peers if peer.role == "actor"]
    learner = next((peer.report for peer in status.peers if peer.role == "learner"), None)
    if learner is None:
        return f"waiting for the learner to connect; {_count(len(actors), 'actor')} connected"
    phase = str(learner.get("phase", "starting"))
    if phase != "rl":
        return _phase_line(phase, learner, status)
    queue = status.queue
    parts = [
        f"step {learner.get('step', 0)}/{learner.get('steps', '?')}",
        f"reward {_number(learner, 'reward_mean', '.3f')}",
        f"generate {_rate(generated_tokens_per_s)}, train {_rate(learner.get('learner_tokens_per_s'))}",
        f"staleness {_number(learner, 'staleness_mean', '.2f')} max {_number(learner, 'staleness_max', '.0f')}"
        + ("" if max_staleness is None else f"/{max_staleness}"),
        f"queue {queue.get('held', 0)}/{queue.get('held_limit', '?')}",
        who_waits(learner, queue, actors),
        *([f"{failures} episodes failed"] if (failures := queue.get("failures")) else []),
    ]
    return " | ".join(parts)


def who_waits(learner: Report, queue: Report, actors: list[PeerStatus]) -> str:
    """Who waits for whom now, or that nobody does."""
    if not actors:
        return "waiting for actors to connect"
    generating = int(queue.get("running", 0)) + int(queue.get("reserved", 0)) > 0
    if learner.get("activity") == "lease":
        return "learner waits for actors" if generating else "learner waits, actors idle"
    if generating:
        return "both busy"
    if int(queue.get("held", 0)) >= int(queue.get("held_limit", 1)):
        return "actors wait: queue full"
    if int(queue.get("pacing", 0)) >= int(queue.get("pacing_limit", 1)):
        return "actors wait: staleness bound"
    return "actors idle"


async def watch(
    get_status: Callable[[], Awaitable[RunStatus]],
    show: Callable[[str], None],
    max_staleness: int,
    interval_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Show a line each interval, for ever; ends with what ``get_status`` raises. *Waits for* nothing but time."""
    rate = TokenRate()
    while True:
        status = await get_status()
        show(progress_line(status, max_staleness, rate.update(status.peers, clock())))
        await asyncio.sleep(interval_s)


def _phase_line(phase: str, learner: Report, status: RunStatus) -> str:
    line = PHASES.get(phase, phase)
    if phase.startswith("evaluation"):
        missing = int(status.queue.get("evaluation_missing", 0)) + int(status.queue.get("evaluation_reserved", 0))
        return f"{line}: {missing} tasks to go"
    if "steps" in learner:
        line += f" {learner.get('step', 0)}/{learner['steps']}"
    return f"{line} loss {_number(learner, 'loss', '.3f')}" if "loss" in learner else line


def _number(report: Report, name: str, form: str) -> str:
    value = report.get(name)
    return "–" if value is None or isinstance(value, str) else format(value, form)


def _rate(value: object) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value / 1000:.1f}k tok/s" if value >= 1000 else f"{value:.0f} tok/s"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
