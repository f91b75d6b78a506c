"""Runs one reservation: task → episode → trajectory, or a counted failure.

User code runs here (sources, episodes, rewards), so this is the one place where any exception is caught: it ends its
episode, is counted by its class, and its text goes to the hub, which grants the sample again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slime_async.actors.engine import SamplingParams
from slime_async.actors.environment import Episode, Generate, Reward, Task
from slime_async.actors.policy import EnginePolicy, Sampler, derive_seed
from slime_async.actors.sources import Source, load_sources
from slime_async.actors.tokenizer import load_tokenizer, stop_token_ids
from slime_async.config.schema import Config
from slime_async.objects import load_callable
from slime_async.protocol import Report, Reservation
from slime_async.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutFailure:
    """An episode that gave no trajectory."""

    reason: str
    """The exception's class and text"""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """What every episode of an actor shares."""

    sampling: SamplingParams
    tokenizer: PreTrainedTokenizerBase
    generate: Generate
    reward: Reward | None
    seed: int
    """The run's"""
    max_context_tokens: int
    timeout_s: float
    """Deadline of one episode"""

    @classmethod
    def from_config(cls, config: Config, checkpoint: Path) -> RolloutSettings:
        """Load the tokenizer of ``checkpoint`` and the functions that ``config.task`` names."""
        tokenizer = load_tokenizer(checkpoint)
        sampling = SamplingParams(
            max_new_tokens=config.sampling.max_new_tokens,
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            top_k=config.sampling.top_k,
            stop_token_ids=stop_token_ids(checkpoint, tokenizer),
        )
        return cls(
            sampling=sampling,
            tokenizer=tokenizer,
            generate=load_callable(config.task.generate, "task.generate"),
            reward=load_callable(config.task.reward, "task.reward") if config.task.reward else None,
            seed=config.run.seed,
            max_context_tokens=config.sampling.max_context_tokens,
            timeout_s=config.actor.episode_timeout_s,
        )


class Rollout:
    """Plays episodes on one engine (or pool), any number at once, and counts what became of them."""

    def __init__(self, settings: RolloutSettings, sources: Mapping[str, Source], engine: Sampler) -> None:
        self._settings = settings
        self._sources = sources
        self._engine = engine
        self._finished = 0
        self._resubmissions = 0
        self._sampled_tokens = 0
        self._busy_s = 0.0
        self._failures: Counter[str] = Counter()

    @property
    def source_sizes(self) -> dict[str, int]:
        """Tasks per source, as ``Hello`` declares them."""
        return {name: len(source) for name, source in self._sources.items()}

    async def run(self, reservation: Reservation) -> Trajectory | RolloutFailure:
        """Generate the reserved trajectory.

        Cancellation passes through; every other exception, and the deadline, becomes a ``RolloutFailure``.
        """
        started = time.monotonic()
        try:
            episode = await self._play(reservation)
            trajectory = episode.to_trajectory(reservation.task, reservation.sample, reservation.attempt)
        except Exception as error:  # user code may raise anything: it ends one episode, never the actor
            name = type(error).__name__
            self._failures[name] += 1
            logger.warning("episode of %s sample %d failed", reservation.task, reservation.sample, exc_info=error)
            return RolloutFailure(f"{name}: {error}")
        finally:
            self._busy_s += time.monotonic() - started
        self._finished += 1
        self._sampled_tokens += int(trajectory.loss_mask.sum())
        return trajectory

    async def _play(self, reservation: Reservation) -> Episode:
        settings, ref = self._settings, reservation.task
        if ref.source not in self._sources:
            raise ValueError(f"no source {ref.source!r} here, only {sorted(self._sources)}: configurations differ")
        policy = EnginePolicy(
            self._engine,
            settings.sampling,
            seed=episode_seed(settings.seed, reservation),
            max_context_tokens=settings.max_context_tokens,
        )
        try:
            async with asyncio.timeout(settings.timeout_s) as deadline:
                content = self._sources[ref.source][ref.index]
                task = Task(ref, reservation.sample, content, settings.sampling, settings.tokenizer, settings.reward)
                episode = await settings.generate(task, policy)
        except TimeoutError as error:
            if not deadline.expired():
                raise  # the environment's own
            raise TimeoutError(f"no result within actor.episode_timeout_s = {settings.timeout_s:g} s") from error
        finally:
            self._resubmissions += policy.resubmissions
        if not isinstance(episode, Episode):
            raise TypeError(f"task.generate returned a {type(episode).__name__}: it must return an Episode")
        return episode

    def report(self) -> Report:
        """Counts since start, for the actor's heartbeat; one ``rollout/failed/<exception>`` per kind of failure."""
        return {
            "rollout/finished": self._finished,
            "rollout/failed": self._failures.total(),
            "rollout/sampled_tokens": self._sampled_tokens,
            "rollout/resubmissions": self._resubmissions,
            "rollout/busy_s": self._busy_s,
            **{f"rollout/failed/{name}": count for name, count in sorted(self._failures.items())},
        }


def make_rollout(config: Config, checkpoint: Path, engine: Sampler) -> Rollout:
    """The rollout of an actor: its sources, tokenizer and functions loaded as ``config`` names them."""
    return Rollout(RolloutSettings.from_config(config, checkpoint), load_sources(config.task), engine)


def episode_seed(run_seed: int, reservation: Reservation) -> int:
    """The seed of one sample. Another attempt at it has the same: a restart repeats what was lost.

    Evaluations are keyed by the task's place in its source, so that every evaluation draws alike and differences
    between two of them come from the weights.
    """
    ref = reservation.task
    if reservation.evaluation:
        return derive_seed(run_seed, "evaluation", ref.source, ref.index, reservation.sample)
    return derive_seed(run_seed, "train", ref.serial, reservation.sample)
