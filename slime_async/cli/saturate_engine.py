"""One engine of a run, as full as it can be: by itself at several loads and in bursts, or in an actor of a real hub."""

from __future__ import annotations

import asyncio
import os
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, NamedTuple

from slime_async.actors.engine import GenerateRequest, Generation, SamplingParams
from slime_async.bench.saturated import Burst, EngineRate, SaturatedEngine
from slime_async.bench.speed import CoreSpeeds, times_as_fast
from slime_async.config import Config
from slime_async.protocol import Reservation
from slime_async.trajectory import TaskRef, Trajectory, WeightId

if TYPE_CHECKING:
    from slime_async.actors.engine import Engine
    from slime_async.actors.pool import EnginePool
    from slime_async.actors.rollout import Rollout

SPARE = 2.0
"""Episodes over what an engine decodes at once, so that it is always full"""
SETTLE_FRACTION = 0.5
"""Of a measurement's time, spent beforehand at the same load"""
POLL_S = 0.05
BURSTS = (1, 8, 32, 128, 384)
"""Requests, up to what the engine decodes at once"""
BURST_FRACTION = 0.2
"""Of a measurement's time, for the bursts of one size and length"""
LEAST_ROUNDS, MOST_ROUNDS = 3, 25
"""In each, a burst of every size and length; the first ones may compile kernels"""
FAR = 4.0
"""Times the mean answer, but for answers that are all shorter: the third length, which tells what contexts cost"""
MUCH_LONGER = 1.5
"""Times as long as the other bursts, from which on the third length is worth its time"""
PROMPT_IDS = 10
"""Their prompts are made of the first few ids, which every model has"""
TOGETHER_TIMEOUT_S = 300.0
"""For all engines that are to be full at the same time"""


class Episode(NamedTuple):
    """What the learner's batches are made of."""

    tokens: int
    sampled: int
    reward: float


async def saturate(config: Config, url: str) -> tuple[SaturatedEngine, list[list[Episode]]]:
    """One engine alone: its rates at several loads, the last beyond what it decodes at once, and its bursts; with the
    complete groups that it played."""
    with _speeds(url) as speeds:
        async with _Filled(config, url, speeds) as filled:
            full = _full(config)
            rates = []
            for episodes in sorted({1, max(1, full // 8), max(1, full // 2), int(full * SPARE)}):
                rates.append(await filled.rate(episodes, last=episodes > full))
            bursts = await filled.bursts(full)
    groups = filled.player.complete_groups()
    played = [episode for group in groups for episode in group]
    engine = SaturatedEngine(
        rates=tuple(sorted(rates, key=lambda rate: rate.running)),
        tokens_per_sample=mean(episode.sampled for episode in played),
        total_tokens_per_sample=mean(episode.tokens for episode in played),
        tokens_per_request=filled.tokens_per_request,
        bursts=tuple(bursts),
    )
    return engine, groups


@dataclass(frozen=True, slots=True)
class Full:
    """A full engine, and when (``time.time``) it was measured."""

    running: float
    tokens_per_s: float
    speed: float
    began_s: float
    ended_s: float


async def keep_full(config: Config, url: str, hub: str, together: Sequence[Path]) -> Full:
    """One engine in an actor that a hub grants whatever it has room for, so with all that a run's actor does. Measured
    once the files ``together`` are there, of which each engine makes its own, the first; there may be just that."""
    from slime_async.actors.pool import EnginePool
    from slime_async.actors.rollout import make_rollout
    from slime_async.actors.worker import Worker

    name, timeout_s = together[0].stem, config.actor.startup_timeout_s
    pool = EnginePool(name, [lambda _: make_engine(config, url)], startup_timeout_s=timeout_s)
    worker = Worker(config, name, pool, make_rollout(config, Path(config.model.path), pool))
    working = asyncio.create_task(worker.run(hub))
    try:
        async with asyncio.timeout(timeout_s):
            await _while(working, lambda: pool.infos)
        together[0].touch()
        async with asyncio.timeout(TOGETHER_TIMEOUT_S):
            await _while(working, lambda: all(path.exists() for path in together))
        with _speeds(url) as speeds:
            rate, began_s, ended_s = await _steady(pool, config.bench.saturated_s, speeds)
    finally:
        working.cancel()
        await asyncio.wait({working})
    return Full(rate.running, rate.tokens_per_s, rate.speed, began_s, ended_s)


async def _while(working: asyncio.Task[bool], ready: Callable[[], object]) -> None:
    """Until ``ready``; raises what ended the actor."""
    while not ready():
        if working.done():
            raise RuntimeError(f"the hub ended the measurement: {working.result()}")
        await asyncio.sleep(POLL_S)


def _speeds(url: str) -> CoreSpeeds:
    """Of the cores of this process; of none where a server computes."""
    return CoreSpeeds(() if url else os.sched_getaffinity(0))


async def _steady(engine: Engine | EnginePool, seconds: float, speeds: CoreSpeeds) -> tuple[EngineRate, float, float]:
    """Tokens per second and running requests after a while at the same load; when this began and ended."""
    await asyncio.sleep(seconds * SETTLE_FRACTION)
    before, begun = (await engine.status()).generated_tokens, time.time()
    running = []
    while time.time() - begun < seconds:
        await asyncio.sleep(POLL_S)
        running.append((await engine.status()).running_requests)
    tokens, ended = (await engine.status()).generated_tokens - before, time.time()
    return EngineRate(mean(running), tokens / (ended - begun), speeds.between(begun, ended)), begun, ended


def _full(config: Config) -> int:
    return min(config.actor.slots, config.actor.max_running_requests)


def make_engine(config: Config, url: str) -> Engine:
    """One engine with the run's settings, which serves the checkpoint's weights at once."""
    from slime_async.actors.embedded.engine import EmbeddedEngine
    from slime_async.actors.sglang.engine import SGLangEngine

    checkpoint, context = Path(config.model.path), config.sampling.max_context_tokens
    if url:
        return SGLangEngine(
            checkpoint,
            engine_id="saturated",
            url=url,
            max_context=context,
            weights=WeightId(0, 0),
            prefill_fraction=config.actor.prefill_fraction,
            prefill_wait_s=config.actor.prefill_wait_s,
        )
    return EmbeddedEngine(
        checkpoint,
        slots=config.actor.max_running_requests,
        max_context=context,
        device=config.actor.device,
        threads=config.actor.threads,
        weights=WeightId(0, 0),
    )


class _Noted:
    """An engine that remembers how long the prompts and answers of its requests were."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.prompts: list[int] = []
        self.answers: list[int] = []

    async def generate(self, request: GenerateRequest) -> Generation:
        generation = await self._engine.generate(request)
        self.prompts.append(len(request.prompt_ids))
        self.answers.append(len(generation.output_ids))
        return generation

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)


class _Filled:
    """An engine and who gives it work."""

    def __init__(self, config: Config, url: str, speeds: CoreSpeeds) -> None:
        from slime_async.actors.rollout import make_rollout

        self._config = config
        self._seconds = config.bench.saturated_s
        self._engine = make_engine(config, url)
        self._speeds = speeds
        self._noted = _Noted(self._engine)
        self.player = _Player(config, make_rollout(config, Path(config.model.path), self._noted))

    async def __aenter__(self) -> _Filled:
        await asyncio.wait_for(self._engine.start(), self._config.actor.startup_timeout_s)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._engine.close()

    @property
    def tokens_per_request(self) -> float:
        return mean(self._noted.answers)

    async def rate(self, episodes: int, *, last: bool) -> EngineRate:
        """At a steady load. The last load's episodes are played to their end: those done first are the short ones."""
        async with asyncio.TaskGroup() as tasks:
            playing = [tasks.create_task(self.player.play()) for _ in range(episodes)]
            rate, _, _ = await _steady(self._engine, self._seconds, self._speeds)
            self.player.closing = last
            for task in () if last else playing:
                task.cancel()
        return rate

    async def bursts(self, full: int) -> list[Burst]:
        """Of half and of one and a half times the mean answer, after prompts of the mean length: between the two,
        contexts are as long as they are on average. And of a long answer: what longer contexts cost."""
        answer, prompt = self.tokens_per_request, round(mean(self._noted.prompts))
        room = self._config.sampling.max_context_tokens - prompt
        short, long = max(1, round(answer / 2)), min(room, max(round(answer * 1.5), round(answer / 2) + 4))
        far = min(room, max(self._noted.answers), round(FAR * answer))
        lengths = (short, long, far) if far >= MUCH_LONGER * long else (short, long)
        sizes = sorted({min(size, full) for size in BURSTS})
        for requests in sizes:
            await self._burst(requests, prompt, 1)  # the first of its size may compile kernels
        kinds = [(requests, tokens) for requests in sizes for tokens in lengths]
        taken: dict[tuple[int, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
        begun = time.time()
        until, rounds = begun + self._seconds * BURST_FRACTION * len(kinds), 0
        while rounds < LEAST_ROUNDS or (time.time() < until and rounds < MOST_ROUNDS):
            rounds += 1
            for kind in kinds:  # by turns, so that a machine that is not always as fast is so for all of them
                burst_begun, seconds = time.time(), await self._burst(kind[0], prompt, kind[1])
                taken[kind].append((seconds, self._speeds.between(burst_begun, time.time())))
        usual = self._speeds.between(begun, time.time())
        return [
            Burst(*kind, median(seconds * times_as_fast(speed, usual) for seconds, speed in bursts), usual)
            for kind, bursts in taken.items()
        ]

    async def _burst(self, requests: int, prompt: int, tokens: int) -> float:
        """Seconds. As in a run, the samples of a group share their prompt; nothing else does."""
        sampling = SamplingParams(max_new_tokens=tokens)
        group_size = self._config.batch.group_size
        prompts = [random.choices(range(PROMPT_IDS), k=prompt) for _ in range(0, requests, group_size)]
        begun = time.monotonic()
        await asyncio.gather(
            *(
                self._engine.generate(GenerateRequest(uuid.uuid4().hex, prompts[i // group_size], sampling))
                for i in range(requests)
            )
        )
        return time.monotonic() - begun


class _Player:
    """Plays the tasks of a run in their order, any number at once."""

    def __init__(self, config: Config, rollout: Rollout) -> None:
        self._rollout = rollout
        self._group_size = config.batch.group_size
        [self._source] = list(config.task.train)[:1]
        self._sizes = rollout.source_sizes
        self._next = 0
        self._played: dict[int, list[Episode]] = {}
        self.closing = False
        """Begin no more episodes"""

    async def play(self) -> None:
        while not self.closing:
            serial, sample = divmod(self._next, self._group_size)
            self._next += 1
            task = TaskRef(serial, self._source, serial % self._sizes[self._source])
            outcome = await self._rollout.run(Reservation(task, sample, 0))
            if not isinstance(outcome, Trajectory):
                raise RuntimeError(f"an episode failed: {outcome.reason}")
            episode = Episode(len(outcome.token_ids), int(outcome.loss_mask.sum()), outcome.reward)
            self._played.setdefault(serial, []).append(episode)

    def complete_groups(self) -> list[list[Episode]]:
        return [group for group in self._played.values() if len(group) == self._group_size]
