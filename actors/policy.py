"""The policy client: turns an environment's prompt ids into engine requests.

One client lives as long as its episode. All requests of an episode carry one session, so that an engine pool can keep
them where their prefix is cached, and each turn has its own seed, so that what is sampled depends on (weights, task,
sample, turn, position) and not on which other requests were in the batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from slime_async.actors.engine import GenerateRequest, Generation, SamplingParams
from slime_async.actors.environment import ContextFullError, EpisodeTruncated
from slime_async.actors.turn import Turn, merge_spans, shift_spans
from slime_async.routing import NOT_RECORDED, Routes, lay_out
from slime_async.trajectory import VersionSpan

ABORT_GRACE_S = 30.0
"""For an engine to hand over what it sampled until it was told to stop; weights may be arriving meanwhile."""


class Sampler(Protocol):
    """What rollouts use of an engine; a pool of engines has it too."""

    async def generate(self, request: GenerateRequest) -> Generation:
        """As ``Engine.generate``."""

    async def abort(self, request_id: str) -> None:
        """As ``Engine.abort``."""


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """What one episode may use; None is without limit."""

    max_context_tokens: int
    """Prompt and answer of one turn together"""
    max_episode_tokens: int | None = None
    """Sampled in all turns"""
    turn_timeout_s: float | None = None
    truncate_after_s: float | None = None
    """Since the episode began"""


def derive_seed(*key: int | str) -> int:
    """A seed in [0, 2⁶³) that depends on every part of ``key``, the same on all machines."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class EnginePolicy:
    """``Policy`` of one episode on one engine or engine pool."""

    def __init__(
        self,
        engine: Sampler,
        sampling: SamplingParams,
        limits: EpisodeLimits,
        *,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``seed`` is the episode's own."""
        self._engine = engine
        self._sampling = sampling
        self._limits = limits
        self._seed = seed
        self._clock = clock
        self._begun = clock()
        self._session = uuid.uuid4().hex
        self._asked = 0
        self._promised = 0
        """Tokens that turns in progress may still sample"""
        self.turns: list[Turn] = []
        """Everything sampled so far, in the order in which it was finished"""
        self.sampled_tokens = 0
        self.resubmissions = 0
        """How often an aborted request was submitted again"""

    def room(self, prompt_ids: Sequence[int]) -> int:
        context = self._limits.max_context_tokens - len(prompt_ids)
        return max(0, context if self._tokens_left is None else min(context, self._tokens_left))

    @property
    def time_left_s(self) -> float | None:
        limit = self._limits.truncate_after_s
        return None if limit is None else max(0.0, self._begun + limit - self._clock())

    async def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Turn:
        params = sampling or self._sampling
        self._check_limits(prompt_ids)
        seed = derive_seed(self._seed, self._asked) if params.seed is None else params.seed
        self._asked += 1
        limit = min(params.max_new_tokens, self.room(prompt_ids))
        self._promised += limit
        try:
            turn = await self._sample(array("i", prompt_ids), replace(params, seed=seed, max_new_tokens=limit))
        finally:
            self._promised -= limit
        if not turn.output_ids:
            raise EpisodeTruncated("deadline", "no token was sampled before the turn's deadline")
        self.turns.append(turn)
        self.sampled_tokens += len(turn.output_ids)
        return turn

    @property
    def _tokens_left(self) -> int | None:
        limit = self._limits.max_episode_tokens
        return None if limit is None else limit - self.sampled_tokens - self._promised

    def _check_limits(self, prompt_ids: Sequence[int]) -> None:
        limits = self._limits
        if self.time_left_s == 0.0:
            raise EpisodeTruncated("deadline", f"sampling.truncate_after_s = {limits.truncate_after_s:g} s are over")
        if self._tokens_left is not None and self._tokens_left <= 0:
            raise EpisodeTruncated(
                "token_budget", f"all of sampling.max_episode_tokens = {limits.max_episode_tokens} are sampled"
            )
        if self.room(prompt_ids) == 0:
            raise ContextFullError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room within sampling.max_context_tokens = "
                f"{limits.max_context_tokens}: raise it, or end the episode when policy.room(prompt_ids) is 0"
            )

    async def _sample(self, prompt_ids: array[int], params: SamplingParams) -> Turn:
        """Sample until the engine says stop or length, or time is over. What an abort interrupts goes on from its last
        token."""
        output_ids: list[int] = []
        logprobs: list[float] = []
        spans: list[VersionSpan] = []
        records: list[tuple[int, Routes]] = []
        times = [t for t in (self._limits.turn_timeout_s, self.time_left_s) if t is not None]
        deadline = self._clock() + min(times) if times else None
        while True:
            request = GenerateRequest(
                request_id=uuid.uuid4().hex,
                prompt_ids=prompt_ids + array("i", output_ids) if output_ids else prompt_ids,
                sampling=replace(params, max_new_tokens=params.max_new_tokens - len(output_ids)),
                session=self._session,
                resumed_tokens=len(output_ids),
            )
            part, in_time = await self._generate(request, deadline)
            if part.output_ids:
                spans += shift_spans(part.spans, len(output_ids))
            output_ids += part.output_ids
            logprobs += part.logprobs
            if part.routed_experts is not None:
                records.append((len(prompt_ids) + len(output_ids), part.routed_experts))
            if part.finish_reason != "abort":
                finish_reason = part.finish_reason
                break
            if len(output_ids) >= params.max_new_tokens:
                finish_reason = "length"
                break
            if not in_time:
                finish_reason = "deadline"
                break
            self.resubmissions += 1
        routes = lay_out(records, len(prompt_ids) + len(output_ids))
        if routes is not None and (known := self._recorded_tokens(prompt_ids)):
            routes = routes[known:].copy()  # a view would keep what it leaves out
        return Turn(prompt_ids, output_ids, array("d", logprobs), merge_spans(spans), finish_reason, routes)

    def _recorded_tokens(self, prompt_ids: array[int]) -> int:
        """Tokens at the prompt's beginning whose experts an earlier turn has: each keeps only what is new in it."""
        for turn in reversed(self.turns):
            if turn.routed_experts is None or (turn.routed_experts[:-1] == NOT_RECORDED).any():
                continue
            before = array("i", [*turn.prompt_ids, *turn.output_ids])
            if prompt_ids[: len(before)] == before:
                return len(before) - 1
        return 0

    async def _generate(self, request: GenerateRequest, deadline: float | None) -> tuple[Generation, bool]:
        """The engine's answer, and whether it came by itself before ``deadline``; it is told to stop at that time."""
        if deadline is None:
            return await self._engine.generate(request), True
        answering = asyncio.ensure_future(self._engine.generate(request))
        try:
            await asyncio.wait({answering}, timeout=max(0.0, deadline - self._clock()))
            if answering.done():
                return answering.result(), True
            await self._engine.abort(request.request_id)
            return await asyncio.wait_for(answering, ABORT_GRACE_S), False
        finally:
            answering.cancel()
