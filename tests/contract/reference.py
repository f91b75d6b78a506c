"""What the engines' tests share: requests, the answers that transformers gives, and a learner that publishes."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slime_async.actors.engine import Engine, EngineStatus, GenerateRequest, SamplingParams
from slime_async.learner.snapshots import WeightBuffers
from slime_async.protocol import TensorSpec, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.weight_group import WeightGroup, host_group

MakeEngine = Callable[..., Engine]
Checkpoints = Callable[..., Path]

DEADLINE_S = 60.0
"""Of a whole test, reached only when something is broken"""
VOCAB = 33
OLD, NEW = WeightId(0, 3), WeightId(0, 4)
SMALL_BUFFER_BYTES = 16 << 10
"""Several for the tests' models, and several tensors in most"""


@dataclass(frozen=True, slots=True)
class Bench:
    """One implementation of ``Engine``, and what may be expected of it."""

    name: str
    make: MakeEngine
    """Takes a checkpoint and ``slots``, ``max_context``, ``weights``, ``engine_id``, ``overlap``"""
    seeded: bool = True
    """Answers depend on seeds, and on nothing else besides weights and prompt"""
    tolerance: float = 1e-4
    """Of each log-probability, against transformers' in fp32"""
    mean_tolerance: float = 1e-4
    """Of their mean, over a hundred tokens or more"""
    unreported_tokens: int = 0
    """May have been sampled, but not been handed over yet"""
    reported_within_s: float = 0.0
    """What was sampled before a pause has arrived so long after it"""
    backend: Literal["gloo", "nccl"] = "gloo"
    device: str = "cpu"
    """Where the learner's tensors lie"""


def run(test: Coroutine[Any, Any, None]) -> None:
    """One test's coroutine, to its end or to the deadline."""

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test

    asyncio.run(bounded())


@asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng([seed, length]).integers(0, VOCAB, length).tolist()
    return ids


def ask(
    prompt_ids: Sequence[int], max_new_tokens: int = 16, *, resumed_tokens: int = 0, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(max_new_tokens, **sampling)
    return GenerateRequest(str(uuid.uuid4()), prompt_ids, params, resumed_tokens=resumed_tokens)


async def eventually(engine: Engine, holds: Callable[[EngineStatus], bool]) -> EngineStatus:
    """The first status for which ``holds``; the test's own deadline bounds the wait."""
    while not holds(status := await engine.status()):
        await asyncio.sleep(0.001)
    return status


# ------------------------------------------------------------------------------------------------- transformers


def load_model(checkpoint: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


def answer_logprobs(
    model: torch.nn.Module, prompt_ids: Sequence[int], output_ids: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """[N], the log-probability of each of the N tokens of an answer."""
    return token_logprobs(_logits(model, [*prompt_ids, *output_ids[:-1]])[-len(output_ids) :], output_ids, temperature)


def logprobs_over_old_cache(
    old: torch.nn.Module, new: torch.nn.Module, ids: Sequence[int], cached: int, temperature: float = 1.0
) -> Tensor:
    """[T − cached − 1]: the new model's log-probabilities of ids[cached + 1:], reading the old model's keys and values
    of the first ``cached`` tokens."""
    with torch.no_grad():
        cache = old(torch.tensor([ids[:cached]]), use_cache=True).past_key_values
        logits = new(torch.tensor([ids[cached:-1]]), past_key_values=cache, use_cache=True).logits[0]
    return token_logprobs(logits, ids[cached + 1 :], temperature)


def greedy_answer(model: torch.nn.Module, prompt_ids: Sequence[int], tokens: int) -> list[int]:
    ids = list(prompt_ids)
    for _ in range(tokens):
        ids.append(int(_logits(model, ids)[-1].argmax()))
    return ids[len(prompt_ids) :]


def token_logprobs(logits: Tensor, ids: Sequence[int], temperature: float) -> Tensor:
    """[n], of token i under row i of ``logits`` [n, V]."""
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def _logits(model: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


# ------------------------------------------------------------------------------------------------------ weights


def tensors_of(checkpoint: Path, device: str = "cpu") -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors", device=device)


class Learner:
    """Rank 0 of a weight group with one engine."""

    def __init__(self, group: WeightGroup) -> None:
        self.group = group

    @classmethod
    @asynccontextmanager
    async def joined_by(
        cls, engine: Engine, epoch: int = 1, backend: Literal["gloo", "nccl"] = "gloo"
    ) -> AsyncIterator[Learner]:
        """The epoch is part of the group's name, which a server knows for as long as it lives."""
        name = f"weights-{uuid.uuid4().hex[:8]}"
        spec, store = host_group(name, epoch, 1 + engine.num_ranks, backend, timeout_s=20.0)
        group, _ = await asyncio.gather(
            asyncio.to_thread(WeightGroup.create, spec, 0), engine.join_weight_group(spec, 1)
        )
        del store
        try:
            yield cls(group)
        finally:
            group.close()

    @staticmethod
    def manifest(tensors: dict[str, Tensor]) -> WeightManifest:
        names = ((name, str(tensor.dtype).removeprefix("torch."), tensor) for name, tensor in tensors.items())
        return WeightManifest(tuple(TensorSpec(name, dtype, tuple(tensor.shape)) for name, dtype, tensor in names))

    async def broadcast(
        self, engine: Engine, tensors: dict[str, Tensor], weights: WeightId, buffer_bytes: int | None = None
    ) -> None:
        """In buffers if the engine takes them, or of ``buffer_bytes``. Raises what the engine raises."""
        manifest = self.manifest(tensors)
        await engine.check_weights(manifest)
        if buffer_bytes is None:
            buffer_bytes = SMALL_BUFFER_BYTES if engine.takes_buffers else 0
        sending = side_by_side(manifest, tensors, buffer_bytes) if buffer_bytes else list(tensors.items())
        receiving: Awaitable[None] = engine.receive_weights(manifest, weights, buffer_bytes=buffer_bytes)
        sent, received = await asyncio.gather(
            asyncio.to_thread(self.group.send, sending), receiving, return_exceptions=True
        )
        for outcome in (received, sent):
            if isinstance(outcome, BaseException):
                raise outcome


def side_by_side(manifest: WeightManifest, tensors: dict[str, Tensor], buffer_bytes: int) -> list[tuple[str, Tensor]]:
    """The tensors side by side in buffers, under their numbers."""
    device = next(iter(tensors.values())).device
    made = WeightBuffers.allocate(manifest, device, buffer_bytes)
    for view, tensor in zip(made.tensors, tensors.values(), strict=True):
        view.copy_(tensor)
    return [(str(number), buffer) for number, (_, buffer) in enumerate(made.buffers)]
