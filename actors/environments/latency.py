"""A game whose tools take their time: some answer at once, a few very late. For benchmarks of asynchrony.

Waiting times are Pareto distributed and keyed by task, sample and turn, so two runs wait alike. With ``tail`` = 1.5 the
slowest of 1,000 calls takes about 100 times the shortest, and one call in a hundred about 20 times.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task


def source(*, size: int = 10_000, prompt: str = "=", reply: str = "+") -> list[dict[str, Any]]:
    """Tasks that differ in nothing but their waiting times."""
    return [{"prompt": prompt, "reply": reply, "task": index} for index in range(size)]


def waiting_time_s(task: int, sample: int, turn: int, *, shortest_s: float, tail: float, longest_s: float) -> float:
    """The time that one call takes: Pareto with index ``tail`` from ``shortest_s`` on, cut at ``longest_s``."""
    drawn = random.Random(f"{task}:{sample}:{turn}").paretovariate(tail)
    return min(longest_s, shortest_s * drawn)


async def generate(
    task: Task,
    policy: Policy,
    *,
    turns: int = 4,
    shortest_s: float = 0.05,
    tail: float = 1.5,
    longest_s: float = 30.0,
) -> Episode:
    """``turns`` answers with a slow tool between them. The reward is the share of answers that ended by themselves."""
    episode = EpisodeBuilder()
    prompt = task.encode(task.content["prompt"])
    waited, ended = 0.0, 0
    for turn in range(turns):
        sampled = await policy.sample(prompt)
        episode.add(sampled)
        ended += sampled.finish_reason == "stop"
        if turn + 1 < turns:
            seconds = waiting_time_s(
                task.content["task"], task.sample, turn, shortest_s=shortest_s, tail=tail, longest_s=longest_s
            )
            await asyncio.sleep(seconds)
            waited += seconds
        prompt = episode.token_ids + task.encode(task.content["reply"])
    return episode.finish(ended / turns, finish_reason="done", metrics={"tool_s": waited})
