"""What episodes cost an actor while they wait: CPU and memory of thousands at once, for tools, engines and workers.

    python -m benchmarks.episodes [--episodes 2000] [--window 5] [--out FILE]

tool      each waits for a slow tool with 4,096 tokens of history: four turns, whose answers are a quarter of them
engine    each waits for the engine's first answer to a prompt of 4,096 tokens, with a deadline per turn
busy      how many short episodes of one turn an otherwise idle event loop plays per second

An episode's memory is the growth of the process over the number of episodes; CPU is what the process used while all of
them waited.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import random
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uvloop

from slime_async.actors import single_turn
from slime_async.actors.engine import GenerateRequest, Generation, SamplingParams
from slime_async.actors.environment import Episode, EpisodeBuilder, Policy, Task
from slime_async.actors.rollout import Rollout, RolloutSettings
from slime_async.demo.tokenizer import EOS, VOCABULARY, make_tokenizer
from slime_async.protocol import Reservation
from slime_async.trajectory import TaskRef, VersionSpan, WeightId

EOS_ID = VOCABULARY.index(EOS)
HISTORY_TOKENS = 4096
TURNS = 4
ANSWER_TOKENS = HISTORY_TOKENS // (4 * TURNS)
ANSWERS = HISTORY_TOKENS // TURNS
"""Tokens from one turn's end to the next's"""
VOCABULARY_SIZE = 150_000
"""Token ids as large models have them: Python shares small numbers, but not these"""
BATCH = 500
"""Short episodes at once"""


class Engine:
    """Answers at once, until it is told to hold its answers back."""

    def __init__(self) -> None:
        self.holding = False
        self.held = 0
        self.release = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> Generation:
        if self.holding:
            self.held += 1
            await self.release.wait()
        count = min(request.sampling.max_new_tokens, ANSWER_TOKENS)
        ids = [*random_ids(count - 1), EOS_ID]
        return Generation(ids, [-random.random() for _ in ids], (VersionSpan(0, WeightId(1, 0)),), "stop")

    async def abort(self, request_id: str) -> None:
        """Nothing is ever so late here."""


async def slow_tool(task: Task, policy: Policy) -> Episode:
    episode = EpisodeBuilder()
    for _ in range(TURNS):
        episode.add(await policy.sample(episode.token_ids + random_ids(ANSWERS - ANSWER_TOKENS)))
    assert len(episode.token_ids) == HISTORY_TOKENS
    task.content["waiting"].append(None)
    await task.content["release"].wait()
    return episode.finish(1.0)


def random_ids(count: int) -> list[int]:
    return random.choices(range(VOCABULARY_SIZE), k=count)


def rss_bytes() -> int:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def waiting(
    rollout: Rollout, episodes: int, window_s: float, all_wait: Callable[[], bool], release: asyncio.Event
) -> dict[str, float]:
    """Start ``episodes``, measure while all of them wait, let them go."""
    gc.collect()
    before, begun = rss_bytes(), time.perf_counter()
    plays = [asyncio.create_task(rollout.run(Reservation(TaskRef(i, "s", 0), 0, 0))) for i in range(episodes)]
    while not all_wait():
        await asyncio.sleep(0.01)
    started_s = time.perf_counter() - begun
    gc.collect()
    used, at = cpu_s(), time.perf_counter()
    grown = rss_bytes() - before
    await asyncio.sleep(window_s)
    cpu = (cpu_s() - used) / (time.perf_counter() - at)
    release.set()
    results = await asyncio.gather(*plays)
    assert all(type(result).__name__ == "Trajectory" for result in results), results[0]
    return {
        "start_s": started_s,
        "kib_per_episode": grown / episodes / 1024,
        "cpu_percent_of_a_core": 100 * cpu,
    }


def make_rollout(
    engine: Engine, generate: Any, content: dict[str, Any], max_new_tokens: int = ANSWER_TOKENS, **settings: Any
) -> Rollout:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=(EOS_ID,))
    made = RolloutSettings(sampling, make_tokenizer(), generate, lambda *_: 1.0, 0, 2 * HISTORY_TOKENS, 600.0)
    return Rollout(replace(made, **settings), {"s": [content]}, engine)


async def measure_tool(episodes: int, window_s: float) -> dict[str, float]:
    content: dict[str, Any] = {"waiting": [], "release": asyncio.Event()}
    rollout = make_rollout(Engine(), slow_tool, content)
    return await waiting(rollout, episodes, window_s, lambda: len(content["waiting"]) == episodes, content["release"])


async def measure_engine(episodes: int, window_s: float) -> dict[str, float]:
    engine = Engine()
    engine.holding = True
    content = {"prompt": random_ids(HISTORY_TOKENS)}
    rollout = make_rollout(engine, single_turn.generate, content, 2, turn_timeout_s=600.0)
    return await waiting(rollout, episodes, window_s, lambda: engine.held == episodes, engine.release)


async def measure_busy(episodes: int, window_s: float) -> dict[str, float]:
    rollout = make_rollout(Engine(), single_turn.generate, {"prompt": "1"}, 2)
    begun = time.perf_counter()
    played = 0
    while time.perf_counter() - begun < window_s:
        refs = (TaskRef(played + i, "s", 0) for i in range(BATCH))
        await asyncio.gather(*(rollout.run(Reservation(ref, 0, 0)) for ref in refs))
        played += BATCH
    return {"episodes_per_s": played / (time.perf_counter() - begun)}


MEASUREMENTS = {"tool": measure_tool, "engine": measure_engine, "busy": measure_busy}


def run(name: str, episodes: int, window_s: float) -> dict[str, float]:
    return uvloop.run(MEASUREMENTS[name](episodes, window_s))


def run_alone(name: str, episodes: int, window_s: float) -> dict[str, float]:
    """In a process of its own, so that no measurement lives on memory that another one freed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(run, name, episodes, window_s).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2000, help="that wait at once")
    parser.add_argument("--window", type=float, default=5.0, help="seconds for which they are watched")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    figures = {name: run_alone(name, arguments.episodes, arguments.window) for name in MEASUREMENTS}
    print("| waiting for | start, s | KiB per episode | CPU, % of a core |\n|---|---|---|---|")
    for name in ("tool", "engine"):
        row = figures[name]
        cells = (row["start_s"], row["kib_per_episode"], row["cpu_percent_of_a_core"])
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    print(f"\n{figures['busy']['episodes_per_s']:,.0f} episodes of one turn per second")
    if arguments.out:
        rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in figures.items()}
        result = {
            "command": f"python -m benchmarks.episodes --episodes {arguments.episodes} --window {arguments.window:g}",
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "versions": {"python": platform.python_version(), "uvloop": uvloop.__version__},
            "episodes": arguments.episodes,
            "figures": rounded,
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
