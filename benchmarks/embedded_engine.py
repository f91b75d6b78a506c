"""How fast the embedded engine generates: sampled tokens per second through its asyncio interface, by concurrency.

    python -m benchmarks.embedded_engine [--threads 1] [--requests 1024] [--out FILE]

The demo's model (0.43M parameters), prompts of 7 tokens, answers of 6; the first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
import time
import uuid
from pathlib import Path

import torch

from slime_async.actors.embedded.engine import EmbeddedEngine
from slime_async.actors.engine import GenerateRequest, SamplingParams
from slime_async.demo.model import make_checkpoint
from slime_async.trajectory import WeightId

PROMPT_TOKENS = 7
ANSWER_TOKENS = 6
ROUNDS = 3


async def tokens_per_s(checkpoint: Path, concurrency: int, requests: int, threads: int) -> float:
    """The best of ``ROUNDS``."""
    engine = EmbeddedEngine(
        checkpoint, slots=concurrency, max_context=32, threads=threads, weights=WeightId(incarnation=0, version=0)
    )
    await engine.start()
    free = asyncio.Semaphore(concurrency)

    async def one(seed: int) -> int:
        prompt = [1 + seed % 9] * PROMPT_TOKENS
        async with free:
            sampling = SamplingParams(ANSWER_TOKENS, seed=seed)
            return len((await engine.generate(GenerateRequest(uuid.uuid4().hex, prompt, sampling))).output_ids)

    async def play() -> float:
        begun = time.perf_counter()
        sampled = sum(await asyncio.gather(*(one(seed) for seed in range(requests))))
        return sampled / (time.perf_counter() - begun)

    rates = [await play() for _ in range(1 + ROUNDS)]
    await engine.close()
    return max(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the engine")
    parser.add_argument("--requests", type=int, default=1024, help="per round")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    figures = {}
    print("| concurrency | sampled tokens/s |\n|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(Path(directory), 0)
        for concurrency in (1, 16, 64, 128):
            requests = min(arguments.requests, 64 * concurrency)
            rate = asyncio.run(tokens_per_s(Path(directory), concurrency, requests, arguments.threads))
            figures[f"tokens_per_s_{concurrency}"] = round(rate, 1)
            print(f"| {concurrency} | {rate:,.0f} |", flush=True)
    if arguments.out:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        arguments.out.write_text(json.dumps({"figures": figures, "environment": environment}, indent=2) + "\n")


if __name__ == "__main__":
    main()
