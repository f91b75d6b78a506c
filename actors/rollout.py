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
from slime_async.actors.environment import Episode, EpisodeTruncated, Generate, Reward, Task
from slime_async.actors.isolation import WorkerPool
from slime_async.actors.plugins import load_generate, load_reward
from slime_async.actors.policy import EnginePolicy, EpisodeLimits, Sampler, derive_seed
from slime_async.actors.recorder import record
from slime_async.actors.shaping import Overlong
from slime_async.actors.sources import Source, load_sources
from slime_async.actors.tokenizer import load_tokenizer, stop_token_ids
from slime_async.config.schema import Config
from slime_async.protocol import Report, Reservation
from slime_async.trajectory import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LOGGED = 4
"""Failures of each kind that are logged with their traceback; of the others, each power of two"""


@dataclass(frozen=True, slots=True)
class RolloutFailure:
    """An episode that gave no trajectory."""

    reason: str
    """The exception's class and text"""
    kind: str
    """What it is counted as (``failure_kind``)"""


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
    """An episode that takes longer has failed"""
    max_episode_tokens: int | None = None
    turn_timeout_s: float | None = None
    truncate_after_s: float | None = None
    truncated_reward: float = 0.0
    overlong: Overlong | None = None
    isolate_reward: bool = False
    workers: int = 1
    worker_memory_bytes: int = 0
    worker_timeout_s: float = 60.0

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
            generate=load_generate(config.task),
            reward=load_reward(config.task),
            seed=config.run.seed,
            max_context_tokens=config.sampling.max_context_tokens,
            timeout_s=config.actor.episode_timeout_s,
            max_episode_tokens=config.sampling.max_episode_tokens,
            turn_timeout_s=config.sampling.turn_timeout_s,
            truncate_after_s=config.sampling.truncate_after_s,
            truncated_reward=config.task.truncated_reward,
            overlong=Overlong.from_config(config),
            isolate_reward=config.task.isolate_reward,
            workers=config.task.processes,
            worker_memory_bytes=config.task.process_memory_bytes,
            worker_timeout_s=config.task.process_timeout_s,
        )

    @property
    def limits(self) -> EpisodeLimits:
        return EpisodeLimits(
            self.max_context_tokens, self.max_episode_tokens, self.turn_timeout_s, self.truncate_after_s
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
        self._truncated: Counter[str] = Counter()
        self._workers = WorkerPool(
            settings.workers, memory_bytes=settings.worker_memory_bytes, timeout_s=settings.worker_timeout_s
        )

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
        except Exception as error:  # noqa: BLE001 - user code may raise anything: it ends one episode, not the actor
            name = type(error).__name__
            kind = failure_kind(error)
            self._failures[kind] += 1
            self._log(error, kind, reservation)
            return RolloutFailure(f"{name}: {error}", kind)
        finally:
            self._busy_s += time.monotonic() - started
        self._finished += 1
        self._truncated[trajectory.finish_reason] += trajectory.truncated
        self._sampled_tokens += int(trajectory.loss_mask.sum())
        return trajectory

    def _log(self, error: Exception, kind: str, reservation: Reservation) -> None:
        """The first ones of each kind, and then ever fewer: what always fails, fails thousands of times a minute."""
        count = self._failures[kind]
        if count <= LOGGED or count & (count - 1) == 0:
            text = "episode of %s sample %d failed, number %d to fail with %s here"
            logger.warning(text, reservation.task, reservation.sample, count, kind, exc_info=error)

    async def _play(self, reservation: Reservation) -> Episode:
        settings, ref = self._settings, reservation.task
        if ref.source not in self._sources:
            raise ValueError(f"no source {ref.source!r} here, only {sorted(self._sources)}: configurations differ")
        policy = EnginePolicy(
            self._engine, settings.sampling, settings.limits, seed=episode_seed(settings.seed, reservation)
        )
        try:
            async with asyncio.timeout(settings.timeout_s) as deadline:
                episode = await settings.generate(self._task(reservation), policy)
        except EpisodeTruncated as truncation:
            if not policy.turns:
                raise
            episode = record(policy.turns).finish(settings.truncated_reward, finish_reason=truncation.reason)
        except TimeoutError as error:
            if not deadline.expired():
                raise  # the environment's own
            raise TimeoutError(f"no result within actor.episode_timeout_s = {settings.timeout_s:g} s") from error
        finally:
            self._resubmissions += policy.resubmissions
        if not isinstance(episode, Episode):
            raise TypeError(f"task.generate returned a {type(episode).__name__}: it must return an Episode")
        training = not reservation.evaluation
        return settings.overlong.shape(episode) if settings.overlong is not None and training else episode

    def _task(self, reservation: Reservation) -> Task:
        settings, ref = self._settings, reservation.task
        return Task(
            ref=ref,
            sample=reservation.sample,
            content=self._sources[ref.source][ref.index],
            sampling=settings.sampling,
            tokenizer=settings.tokenizer,
            reward=settings.reward,
            isolate_reward=settings.isolate_reward,
            workers=self._workers,
        )

    async def close(self) -> None:
        """End the worker processes; an environment that is a class may have a ``close``, which is awaited first."""
        close = getattr(getattr(self._settings.generate, "__self__", None), "close", None)
        if close is not None:
            await close()
        await self._workers.close()

    def report(self) -> Report:
        """Counts since start, for the actor's heartbeat.

        One ``rollout/failed/<exception>`` per kind of failure, one ``rollout/truncated/<reason>`` per limit.
        """
        return {
            "rollout/finished": self._finished,
            "rollout/failed": self._failures.total(),
            "rollout/sampled_tokens": self._sampled_tokens,
            "rollout/resubmissions": self._resubmissions,
            "rollout/busy_s": self._busy_s,
            **{f"rollout/failed/{name}": count for name, count in sorted(self._failures.items())},
            **{f"rollout/truncated/{reason}": count for reason, count in sorted(self._truncated.items()) if count},
        }


def failure_kind(error: Exception) -> str:
    """What a failure is counted as: its class, and the reason that it carries, if it does."""
    reason = getattr(error, "reason", None)
    return f"{type(error).__name__}:{reason}" if isinstance(reason, str) and reason else type(error).__name__


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
