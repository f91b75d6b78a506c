"""Tasks, sound and broken, for the contract test. No torch here: another process imports this to compare sources."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace

from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task
from slime_async.actors.turn import Turn


def tasks() -> list[dict[str, str]]:
    return [{"prompt": f"+{a}{b}=", "answer": "12"} for a, b in itertools.product(range(4), repeat=2)]


def exact(content: dict[str, str], answer: str, finish_reason: str) -> float:
    return float(answer == content["answer"])


async def sound(task: Task, policy: Policy) -> Episode:
    """Two turns, a fork of the first, and a role of its own."""
    episode = EpisodeBuilder()
    first = await policy.sample(task.encode(task.content["prompt"]))
    episode.add(first, reward=0.125)
    fork = episode.fork()
    critic = episode.branch("critic")
    prompts = [[*episode.token_ids, 10], [*fork.token_ids, 11], task.encode("-")]
    turns = await asyncio.gather(*(policy.sample(prompt) for prompt in prompts))
    for branch, turn in zip((episode, fork, critic), turns, strict=True):
        branch.add(turn)
    return episode.finish(await task.judge(task.answer_text(first), first.finish_reason))


async def tokenises_again(task: Task, policy: Policy) -> Episode:
    """Text that looks the same: the tokens trained are not those that were sampled."""
    prompt = task.encode(task.content["prompt"])
    turn = await policy.sample(prompt)
    ids = task.encode(task.answer_text(turn)) or [0]
    episode = EpisodeBuilder()
    episode.add(replace(turn, output_ids=ids, logprobs=[-1.0] * len(ids), spans=turn.spans[:1]))
    return episode.finish(0.0)


async def invents_logprobs(task: Task, policy: Policy) -> Episode:
    turn = await policy.sample([1])
    episode = EpisodeBuilder()
    episode.add(Turn([1], turn.output_ids, [-0.7] * len(turn.output_ids), turn.spans, "stop"))
    return episode.finish(0.0)


async def trains_twice(task: Task, policy: Policy) -> Episode:
    turn = await policy.sample([1])
    episode = EpisodeBuilder()
    episode.add(turn)
    episode.branch().add(turn)
    return episode.finish(0.0)


counter = itertools.count()


async def shares_state(task: Task, policy: Policy) -> Episode:
    episode = EpisodeBuilder()
    episode.add(await policy.sample([1, next(counter) % 10]))
    return episode.finish(0.0)


async def swallows_cancellation(task: Task, policy: Policy) -> Episode:
    asyncio.get_running_loop().create_task(asyncio.sleep(30), name="a telegraph")
    return await sound(task, policy)


def moody(content: dict[str, str], answer: str, finish_reason: str) -> float:
    return float(next(counter))


def infinite(content: dict[str, str], answer: str, finish_reason: str) -> float:
    return float("inf")


def by_hash() -> list[str]:
    return [str(hash(word)) for word in ("tea", "biscuit")]


def by_clock() -> list[float]:
    return [time.time()]


async def leaves_turns_out(task: Task, policy: Policy) -> Episode:
    await policy.sample([1])
    episode = EpisodeBuilder()
    episode.add(await policy.sample([2]))
    return episode.finish(1.0)
