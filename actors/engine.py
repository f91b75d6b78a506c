"""What every inference engine can do, whatever runs behind it.

The embedded engine and SGLang pass one contract test suite against this protocol. All methods are coroutines on the
actor's event loop; none blocks it. A request's life::

    generate ──► running ──► finished (stop | length)
                    │ pause(in_place | retract): stays open, goes on after resume
                    └ pause(abort), abort(id): finished (abort) with the tokens sampled so far
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from slime_async.protocol import SharedTensor, WeightGroupSpec, WeightManifest
from slime_async.routing import Routes
from slime_async.trajectory import VersionSpan, WeightId

BusySpan = Callable[[int, int], None]
"""Called with the first and last nanosecond (``time.monotonic_ns``) of uninterrupted computing, on whatever thread"""


class PauseMode(StrEnum):
    """What happens to requests in flight while weights change."""

    IN_PLACE = "in_place"
    """They keep their KV cache: the next tokens come from new weights over old keys and values."""
    RETRACT = "retract"
    """Their KV cache is recomputed with the new weights."""
    ABORT = "abort"
    """They end with what they have; the caller submits them again with the tokens already sampled."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. Log-probabilities are after temperature, before top-p and top-k (as SGLang reports them)."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy; log-probabilities are then those at temperature 1"""
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """With a seed, token ``i`` of the answer depends on (weights, prompt, seed, i) alone, not on the batch"""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Token ids in. ``session`` ties the turns of one episode to the engine that holds their prefix."""

    request_id: str
    """Unique and of fixed width (UUID): engines may match ids by prefix"""
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    session: str | None = None
    resumed_tokens: int = 0
    """The last ``resumed_tokens`` of ``prompt_ids`` were sampled before this request: positions of a seed go on"""


@dataclass(frozen=True, slots=True)
class Generation:
    """Token ids out; N tokens were sampled. Spans count from the first sampled token (0), half-open by their order."""

    output_ids: list[int]
    logprobs: list[float]
    spans: tuple[VersionSpan, ...]
    finish_reason: str
    """``stop``, ``length`` or ``abort``"""
    routed_experts: Routes | None = None
    """Of all tokens, the prompt's too, from engines that record it; None also where an answer broke off unrecorded"""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot of an engine, for routing, health and metrics."""

    engine_id: str
    weights: WeightId | None
    """None before the first weights arrived: the engine serves nothing yet"""
    paused: bool
    running_requests: int
    waiting_requests: int
    generated_tokens: int
    """Since start"""


class EngineError(RuntimeError):
    """The engine could not do what was asked. The message says which engine, what, and why."""

    partial: Generation | None = None
    """Of a ``generate`` that broke off: what the engine had handed over by then, to go on from elsewhere"""


def check_request(request: GenerateRequest, vocab_size: int, max_context: int) -> None:
    """What every engine refuses, with ``ValueError``, before it costs anything: some engines die of such requests."""
    ids, sampling = request.prompt_ids, request.sampling
    if not ids:
        raise ValueError(f"request {request.request_id}: the prompt is empty; it needs at least one token")
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(
            f"request {request.request_id}: token id {wrong[0]} is outside the vocabulary of {vocab_size}; "
            "was it encoded with another model's tokenizer?"
        )
    if len(ids) >= max_context:
        raise ValueError(
            f"request {request.request_id}: a prompt of {len(ids)} tokens leaves no room in a context of "
            f"{max_context}; raise sampling.max_context_tokens or shorten the prompt"
        )
    refused = {
        "max_new_tokens": (sampling.max_new_tokens, sampling.max_new_tokens < 1, "ask for at least 1"),
        "temperature": (sampling.temperature, not 0 <= sampling.temperature < math.inf, "0 is greedy, 1 the model"),
        "top_p": (sampling.top_p, not 0 < sampling.top_p <= 1, "a share of the mass, 1 for all"),
        "seed": (sampling.seed, not 0 <= (sampling.seed or 0) < 2**64, "64 bits without a sign"),
        "resumed_tokens": (request.resumed_tokens, not 0 <= request.resumed_tokens <= len(ids), "they end the prompt"),
    }
    for name, (value, is_refused, remedy) in refused.items():
        if is_refused:
            raise ValueError(f"request {request.request_id}: {name} = {value}; {remedy}")


class Engine(Protocol):
    """One inference engine: any number of devices that hold one copy of the weights."""

    @property
    def engine_id(self) -> str: ...

    @property
    def num_ranks(self) -> int:
        """How many ranks this engine takes in a weight group."""

    @property
    def takes_buffers(self) -> bool:
        """Whether weights may come to it side by side in large buffers. Known once it is started."""

    async def start(self) -> None:
        """Bring the engine up. It may hold no weights yet. Raises ``EngineError`` when it cannot."""

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample one answer. Waits while the engine is paused or has no weights.

        Cancelling the call ends the request in the engine, too: episodes have deadlines.
        Raises ``ValueError`` for token ids outside the vocabulary, an empty prompt or a prompt too long for the
        context; ``EngineError`` when the engine died.
        """

    async def abort(self, request_id: str) -> None:
        """End one request; its ``generate`` returns what was sampled with ``finish_reason='abort'``."""

    async def pause(self, mode: PauseMode) -> None:
        """Returns once no token is being sampled."""

    async def resume(self) -> None: ...

    @property
    def in_flight_at_update(self) -> int:
        """Requests that were being sampled when the last weights arrived."""

    async def join_weight_group(
        self, spec: WeightGroupSpec, rank_offset: int, others: Sequence[WeightGroupSpec] = ()
    ) -> None:
        """Join a group of which the learner is rank 0, then ``others``, each with another of its ranks as rank 0.

        Leaves those before. Returns when all have joined.
        """

    async def check_weights(self, manifest: WeightManifest) -> None:
        """Raises ``ValueError`` for weights of another model: asked before anybody sends, when it costs nothing yet."""

    async def receive_weights(
        self,
        manifest: WeightManifest,
        weights: WeightId,
        shared: Sequence[SharedTensor] = (),
        shares: Sequence[int] = (),
        buffer_bytes: int = 0,
    ) -> None:
        """Take part in one broadcast, or take what is ``shared``; use it from the next sampled token on.

        ``shares``: how many of the manifest's tensors come over each of the groups joined, one group after the other.
        ``buffer_bytes``: they come side by side in buffers of that size; 0: each by itself.
        """

    async def status(self) -> EngineStatus:
        """Raises ``EngineError`` when the engine died. Costs nothing."""

    async def check_health(self) -> None:
        """Raises ``EngineError`` when the engine died or hangs; a paused engine is healthy. May ask the engine."""

    async def close(self) -> None:
        """Release everything; open requests end with ``EngineError``."""
