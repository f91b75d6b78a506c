"""The policy client: turns an environment's prompt ids into engine requests.

One client lives as long as its episode. All requests of an episode carry one session, so that an engine pool can keep
them where their prefix is cached, and each turn has its own seed, so that what is sampled depends on (weights, task,
sample, turn, position) and not on which other requests were in the batch.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from slime_async.actors.engine import GenerateRequest, Generation, SamplingParams
from slime_async.actors.environment import ContextFullError
from slime_async.actors.episode import Turn, merge_spans, shift_spans
from slime_async.trajectory import VersionSpan


class Sampler(Protocol):
    """The one method of an engine that rollouts use; a pool of engines has it too."""

    async def generate(self, request: GenerateRequest) -> Generation:
        """As ``Engine.generate``."""


def derive_seed(*key: int | str) -> int:
    """A seed in [0, 2⁶³) that depends on every part of ``key``, the same on all machines."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class EnginePolicy:
    """``Policy`` of one episode on one engine or engine pool."""

    def __init__(self, engine: Sampler, sampling: SamplingParams, *, seed: int, max_context_tokens: int) -> None:
        """``seed`` is the episode's own; ``max_context_tokens`` bounds prompt and answer together."""
        self._engine = engine
        self._sampling = sampling
        self._seed = seed
        self._max_context_tokens = max_context_tokens
        self._session = uuid.uuid4().hex
        self._turns = 0
        self.resubmissions = 0
        """How often an aborted request was submitted again"""

    def room(self, prompt_ids: Sequence[int]) -> int:
        return max(0, self._max_context_tokens - len(prompt_ids))

    async def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Turn:
        params = sampling or self._sampling
        room = self.room(prompt_ids)
        if room == 0:
            raise ContextFullError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room within sampling.max_context_tokens = "
                f"{self._max_context_tokens}: raise it, or end the episode when policy.room(prompt_ids) is 0"
            )
        seed = derive_seed(self._seed, self._turns) if params.seed is None else params.seed
        self._turns += 1
        return await self._sample(
            list(prompt_ids), replace(params, seed=seed, max_new_tokens=min(params.max_new_tokens, room))
        )

    async def _sample(self, prompt_ids: list[int], params: SamplingParams) -> Turn:
        """Sample until the engine says stop or length. What an abort interrupts goes on from its last token."""
        output_ids: list[int] = []
        logprobs: list[float] = []
        spans: list[VersionSpan] = []
        while True:
            part = await self._engine.generate(
                GenerateRequest(
                    request_id=uuid.uuid4().hex,
                    prompt_ids=prompt_ids + output_ids,
                    sampling=replace(params, max_new_tokens=params.max_new_tokens - len(output_ids)),
                    session=self._session,
                    resumed_tokens=len(output_ids),
                )
            )
            if part.output_ids:
                spans += shift_spans(part.spans, len(output_ids))
            output_ids += part.output_ids
            logprobs += part.logprobs
            if part.finish_reason != "abort":
                finish_reason = part.finish_reason
                break
            if len(output_ids) >= params.max_new_tokens:
                finish_reason = "length"
                break
            self.resubmissions += 1
        return Turn(prompt_ids, output_ids, logprobs, merge_spans(spans), finish_reason)
