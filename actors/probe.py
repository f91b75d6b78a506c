"""An engine that answers anything at random and remembers every token: what contract tests compare episodes with."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from slime_async.actors.engine import GenerateRequest, Generation
from slime_async.trajectory import VersionSpan, WeightId

ABORT_SHARE = 0.25
"""Of requests that end in their middle, as weights arriving with pause = "abort" end them"""
STOP_SHARE = 0.2
"""Of tokens that end an answer"""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token as the engine sampled it."""

    token_id: int
    logprob: float
    version: int


@dataclass
class ProbeEngine:
    """What it says depends on the request's seed, prompt and position alone, and never on the other requests.

    Versions rise by one in the middle of some answers; requests take a few turns of the event loop.
    """

    vocabulary: Sequence[int]
    """Ids that it may say"""
    canned: Sequence[Sequence[int]] = ()
    """Answers of which it gives one, where there are any, every other time"""
    log: dict[str, list[tuple[tuple[int, ...], tuple[SampledToken, ...]]]] = field(default_factory=dict)
    """By session: (prompt, what was sampled after it) of each request"""

    async def generate(self, request: GenerateRequest) -> Generation:
        draw = random.Random(f"{request.sampling.seed} {request.resumed_tokens} {list(request.prompt_ids)}")
        for _ in range(draw.randrange(3)):
            await asyncio.sleep(0)
        tokens, reason = self._answer(request, draw)
        if len(tokens) > 1 and draw.random() < ABORT_SHARE:
            tokens, reason = tokens[: len(tokens) // 2], "abort"
        change = draw.randrange(len(tokens) + 1)
        sampled = tuple(
            SampledToken(token, -draw.randrange(1, 64) / 8, int(i >= change)) for i, token in enumerate(tokens)
        )
        self.log.setdefault(request.session or "", []).append((tuple(request.prompt_ids), sampled))
        starts = [i for i, token in enumerate(sampled) if i == 0 or token.version != sampled[i - 1].version]
        spans = tuple(VersionSpan(i, WeightId(0, sampled[i].version)) for i in starts)
        return Generation(tokens, [token.logprob for token in sampled], spans, reason)

    async def abort(self, request_id: str) -> None:
        """Answers come at once: there is never one to end."""

    def _answer(self, request: GenerateRequest, draw: random.Random) -> tuple[list[int], str]:
        limit, stops = request.sampling.max_new_tokens, request.sampling.stop_token_ids
        if self.canned and not request.resumed_tokens and draw.random() < 0.5:
            said = [*draw.choice(self.canned), *stops[:1]]
            return said[:limit], "stop" if len(said) <= limit else "length"
        tokens: list[int] = []
        while len(tokens) < limit:
            if stops and draw.random() < STOP_SHARE:
                return [*tokens, draw.choice(stops)], "stop"
            tokens.append(draw.choice(self.vocabulary))
        return tokens, "length"
