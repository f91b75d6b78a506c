"""A scripted engine: it answers as a test tells it to, in the real engine protocol's types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from slime_async.actors.engine import EngineStatus, GenerateRequest, Generation, SamplingParams
from slime_async.actors.environment import Reward, Task
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.demo.tokenizer import EOS, VOCABULARY, make_tokenizer
from slime_async.protocol import WeightManifest
from slime_async.trajectory import TaskRef, VersionSpan, WeightId

EOS_ID = VOCABULARY.index(EOS)
TOKENIZER = make_tokenizer()
SAMPLING = SamplingParams(max_new_tokens=7, stop_token_ids=(EOS_ID,))

Answer = Generation | Callable[[GenerateRequest], Generation]


def weights(version: int) -> WeightId:
    return WeightId(1, version)


def answer(ids: Iterable[int], *, versions: Mapping[int, int] | None = None, reason: str = "stop") -> Generation:
    """An answer whose i-th log-prob is −(i + 1) / 8, exact in fp32; ``versions`` maps first tokens to versions."""
    output_ids = list(ids)
    spans = tuple(VersionSpan(first, weights(version)) for first, version in (versions or {0: 0}).items())
    logprobs = [-(i + 1) / 8 for i in range(len(output_ids))]
    return Generation(output_ids, logprobs, spans if output_ids else (), reason)


def says(text: str) -> Generation:
    """A complete answer in the demo's alphabet, from version 0."""
    return answer([*TOKENIZER.encode(text), EOS_ID])


@dataclass
class ScriptedEngine:
    """Answers its n-th request with the n-th entry of ``script``, and with the last one from then on."""

    script: list[Answer]
    requests: list[GenerateRequest] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> Generation:
        self.requests.append(replace(request, prompt_ids=list(request.prompt_ids)))
        entry = self.script[min(len(self.requests), len(self.script)) - 1]
        return entry if isinstance(entry, Generation) else entry(request)

    async def abort(self, request_id: str) -> None:
        raise AssertionError(f"{request_id} has been answered: nothing is left to abort")


def make_task(content: Any, reward: Reward | None = None) -> Task:
    return Task(TaskRef(0, "test", 0), 0, content, SAMPLING, TOKENIZER, reward)


def make_policy(engine: ScriptedEngine, *, seed: int = 0, max_context_tokens: int = 64) -> EnginePolicy:
    return EnginePolicy(engine, SAMPLING, EpisodeLimits(max_context_tokens), seed=seed)


class ScriptedProcess(ScriptedEngine):
    """A scripted engine with the parts of a whole one that an evaluation uses: start, status, close."""

    engine_id = "scripted"
    num_ranks = 1
    takes_buffers = False
    weights: WeightId | None = weights(0)
    state = "new"

    async def start(self) -> None:
        assert self.state == "new"
        self.state = "started"

    async def status(self) -> EngineStatus:
        return EngineStatus(self.engine_id, self.weights, False, 0, 0, 0)

    async def check_health(self) -> None:
        assert self.state == "started"

    async def check_weights(self, manifest: WeightManifest) -> None:
        assert not manifest.tensors

    async def close(self) -> None:
        self.state = "closed"
