"""The contract test of a task: plays its episodes on an engine that remembers every token, and says what is wrong.

    slime-async check-task my_task.toml

or, among your own tests::

    from slime_async.actors.check import check_task

    def test_my_task_keeps_its_contract() -> None:
        check_task(load_config(Path("my_task.toml")), checkpoint).raise_for_errors()

======================  ==============================================================================================
a source                holds the same tasks in another process, and when it is built again
an episode              contains what the engine sampled: every token, log-probability and version, each trained once
                        says the same when it is played again, alone or among others
                        ends when it is cancelled, and leaves no task behind
a reward                is finite, and the same for the same answer
the event loop          is not held up (a warning: how long is too long depends on the machine)
======================  ==============================================================================================
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from slime_async.actors.check_episode import compare_trajectories, compare_with_engine
from slime_async.actors.check_source import check_sources
from slime_async.actors.probe import ProbeEngine
from slime_async.actors.rollout import Rollout, RolloutFailure, RolloutSettings
from slime_async.actors.sources import load_sources
from slime_async.config.schema import Config
from slime_async.protocol import Reservation
from slime_async.trajectory import TaskRef, Trajectory

EPISODES = 16
SLOW_S = 0.1
"""The event loop held up for longer than this is worth a warning"""
EPISODE_TIMEOUT_S = 60.0
"""Instead of the run's, which may be long"""
CANCEL_TIMEOUT_S = 10.0


@dataclass
class CheckReport:
    """What was found. Warnings are worth a look; errors would spoil training."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    episodes: int = 0
    turns: int = 0
    rewards: list[float] = field(default_factory=list)
    finish_reasons: dict[str, int] = field(default_factory=dict)

    def raise_for_errors(self) -> None:
        """Raises ``AssertionError`` that lists all errors, for use in a test."""
        if self.errors:
            raise AssertionError("the task breaks its contract:\n- " + "\n- ".join(self.errors))


def check_task(config: Config, checkpoint: Path, *, answers: Sequence[str] = ()) -> CheckReport:
    """Check sources, episodes and rewards of ``config.task`` with the tokenizer of ``checkpoint``.

    The engine says random tokens; with ``answers`` it says one of these about every other time, so that episodes get
    further and rewards differ. Raises ``ConfigError`` for what cannot be loaded at all.
    """
    settings = RolloutSettings.from_config(config, checkpoint)
    settings = replace(settings, timeout_s=min(settings.timeout_s, EPISODE_TIMEOUT_S))
    report = CheckReport()
    check_sources(config.task, report.errors)
    asyncio.run(_check_episodes(config, settings, answers, report))
    return report


async def _check_episodes(
    config: Config, settings: RolloutSettings, answers: Sequence[str], report: CheckReport
) -> None:
    sources = load_sources(config.task)
    engine = _probe(settings, answers)
    rollout = Rollout(settings, sources, engine)
    names = sorted(sources)
    reservations = [
        Reservation(TaskRef(i, names[i % len(names)], (i // len(names)) % len(sources[names[i % len(names)]])), 0, 0)
        for i in range(EPISODES)
    ]
    watch = LoopWatch()
    watching = asyncio.create_task(watch.run())
    try:
        alone = [await _play(rollout, engine, reservation, report) for reservation in reservations]
        among_others = await asyncio.gather(*(rollout.run(reservation) for reservation in reservations))
        for i, (first, again) in enumerate(zip(alone, among_others, strict=True)):
            if isinstance(first, Trajectory) and isinstance(again, Trajectory):
                differences = compare_trajectories(first, again)
                report.errors += [f"episode {i}, played again among others: {d}" for d in differences]
        await _check_cancellation(rollout, reservations[0], report)
    finally:
        watching.cancel()
        await asyncio.wait({watching})
        await rollout.close()
    if watch.longest_s > SLOW_S:
        report.warnings.append(
            f"the event loop was held up for {watch.longest_s:.2f} s: every other episode waits meanwhile. Isolate the "
            "reward (task.isolate_reward = true), or run the environment with task.workers"
        )
    if len(set(report.rewards)) == 1:
        report.warnings.append(
            f"all {len(report.rewards)} rewards are {report.rewards[0]:g}: nothing shows that the task can tell good "
            "answers from bad ones; give some right ones (--answer)"
        )


def _probe(settings: RolloutSettings, answers: Sequence[str]) -> ProbeEngine:
    tokenizer = settings.tokenizer
    special = set(tokenizer.all_special_ids)
    vocabulary = [token for token in range(len(tokenizer)) if token not in special]
    canned = [list(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers]
    return ProbeEngine(vocabulary or list(range(len(tokenizer))), canned)


async def _play(
    rollout: Rollout, engine: ProbeEngine, reservation: Reservation, report: CheckReport
) -> Trajectory | RolloutFailure:
    """One episode by itself, compared with what the engine has sampled."""
    label = f"episode {reservation.task.serial} (task {reservation.task.index} of {reservation.task.source!r})"
    engine.log.clear()
    outcome = await rollout.run(reservation)
    report.episodes += 1
    exchanges = [exchange for session in engine.log.values() for exchange in session]
    report.turns += len(exchanges)
    if isinstance(outcome, RolloutFailure):
        report.errors.append(f"{label} failed: {outcome.reason}")
        return outcome
    report.rewards.append(outcome.reward)
    report.finish_reasons[outcome.finish_reason] = report.finish_reasons.get(outcome.finish_reason, 0) + 1
    problems, left_out = compare_with_engine(outcome, exchanges)
    report.errors += [f"{label}, {problem}" for problem in problems]
    if left_out:
        report.warnings.append(f"{label}: {left_out} of {len(exchanges)} answers of the engine are not trained")
    return outcome


async def _check_cancellation(rollout: Rollout, reservation: Reservation, report: CheckReport) -> None:
    """An actor that ends cancels its episodes: none may swallow that, or go on in the background."""
    before = asyncio.all_tasks()
    playing = asyncio.create_task(rollout.run(reservation))
    await asyncio.sleep(0)
    playing.cancel()
    await asyncio.wait({playing}, timeout=CANCEL_TIMEOUT_S)
    if not playing.done():
        report.errors.append(f"a cancelled episode goes on for {CANCEL_TIMEOUT_S:g} s: re-raise CancelledError")
    await asyncio.sleep(0)
    left = [task.get_name() for task in asyncio.all_tasks() - before - {playing} if not task.done()]
    if left:
        report.errors.append(f"a cancelled episode leaves tasks behind: {', '.join(left)}; await or cancel them")


class LoopWatch:
    """How long the event loop was ever kept from its next turn."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last)
            last = now
