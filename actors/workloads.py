"""Episodes whose lengths and delays are drawn beforehand, so that every way of training meets the same work.

What is drawn depends on the run's tasks alone: on a task's place in its source and on the sample's number, never on the
weights or on who plays it. The answers mean nothing; their rewards only have to differ, so that each one is trained.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task

FIRST_TOKEN = 0
"""Prompts and what tools answer are made of the first few ids of the vocabulary, which every model has"""
PROMPT_VOCABULARY = 10


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(log median, sigma²)), cut at both ends."""

    median: float
    sigma: float
    shortest: float
    longest: float

    def __post_init__(self) -> None:
        if not 0 < self.shortest <= self.median <= self.longest or self.sigma < 0:
            raise ValueError(f"{self}: needs 0 < shortest <= median <= longest and sigma >= 0")

    def at(self, *key: object) -> float:
        """The value that belongs to ``key``: the same in every process."""
        return min(self.longest, max(self.shortest, self.median * math.exp(self.sigma * standard_normal(*key))))


def standard_normal(*key: object) -> float:
    """A draw from N(0, 1) that is a function of ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return NormalDist().inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**64)


class Forced:
    """A source of tasks: item ``i`` is a prompt of ``prompt_tokens`` ids and what its answers are like."""

    def __init__(self, count: int, seed: int, prompt_tokens: int, settings: Mapping[str, Any]) -> None:
        self._count, self._seed, self._prompt_tokens, self._settings = count, seed, prompt_tokens, settings

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"prompt": filler(self._prompt_tokens, self._seed, index), "key": (self._seed, index), **self._settings}


def answers(
    *, median: float, sigma: float, longest: int, count: int = 100_000, seed: int = 0, prompt_tokens: int = 16
) -> Forced:
    """Single answers of log-normal length, for ``forced_answer``."""
    return Forced(count, seed, prompt_tokens, {"tokens": LogNormal(median, sigma, 1, longest)})


def tool_episodes(
    *,
    turns: int,
    median: float,
    sigma: float,
    longest: int,
    tool_median_s: float,
    tool_sigma: float,
    tool_longest_s: float,
    tool_tokens: int = 8,
    count: int = 100_000,
    seed: int = 0,
    prompt_tokens: int = 16,
) -> Forced:
    """Episodes of several turns, a tool's answer of ``tool_tokens`` after each but the last, for ``tool_episode``."""
    settings = {
        "turns": turns,
        "tokens": LogNormal(median, sigma, 1, longest),
        "tool_s": LogNormal(tool_median_s, tool_sigma, min(tool_median_s, 1e-3), tool_longest_s),
        "tool_tokens": tool_tokens,
    }
    return Forced(count, seed, prompt_tokens, settings)


def filler(count: int, *key: object) -> list[int]:
    """``count`` token ids that are a function of ``key``."""
    digest = hashlib.shake_128(repr(key).encode()).digest(count)
    return [FIRST_TOKEN + byte % PROMPT_VOCABULARY for byte in digest]


async def forced_answer(task: Task, policy: Policy) -> Episode:
    """One answer of the length that the task prescribes."""
    episode = EpisodeBuilder()
    output = await _sample(task, policy, task.content["prompt"], 0, episode)
    return episode.finish(even_share(output))


async def tool_episode(task: Task, policy: Policy) -> Episode:
    """Turns of prescribed lengths; between them a tool takes its time, without the engine."""
    content, episode = task.content, EpisodeBuilder()
    prompt: list[int] = list(content["prompt"])
    output: list[int] = []
    for turn in range(content["turns"]):
        output += await _sample(task, policy, prompt, turn, episode)
        if turn + 1 < content["turns"]:
            key = (*content["key"], task.sample, turn)
            await asyncio.sleep(content["tool_s"].at("tool", *key))
            prompt = episode.token_ids + filler(content["tool_tokens"], *key)
    return episode.finish(even_share(output))


async def _sample(task: Task, policy: Policy, prompt: Sequence[int], turn: int, episode: EpisodeBuilder) -> list[int]:
    tokens = round(task.content["tokens"].at("tokens", *task.content["key"], task.sample, turn))
    turn_ = await policy.sample(prompt, replace(task.sampling, max_new_tokens=tokens, stop_token_ids=()))
    episode.add(turn_)
    return list(turn_.output_ids)


def even_share(output: Sequence[int]) -> float:
    """Share of even token ids: a reward that nearly always differs within a group, and that RL can raise."""
    return sum(token % 2 == 0 for token in output) / max(1, len(output))
