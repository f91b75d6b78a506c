"""Requests that one SGLang server works on: their pieces as they come in, and what can be said of them at any time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from slime_async.actors.engine import GenerateRequest, Generation, PauseMode
from slime_async.actors.sglang.client import Chunk
from slime_async.actors.sglang.routing import RoutingShape
from slime_async.actors.sglang.versions import ChunkStamps, exact_spans, reported_spans
from slime_async.actors.turn import merge_spans, shift_spans
from slime_async.routing import Routes, lay_out
from slime_async.trajectory import VersionSpan, WeightId


@dataclass(eq=False)
class Answer:
    """One request and what was sampled for it, over as many submissions as it takes."""

    request: GenerateRequest
    routing: RoutingShape | None = None
    """Of the experts to be recorded; None where none are"""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    submitted: bool = False
    """The server has it now"""
    cut_by: PauseMode | None = None
    """The pause that ended the current submission"""
    aborted: bool = False
    """Its owner wants it to end"""
    cutoff: asyncio.Timeout | None = None
    """Ends the wait for the server, when there is nothing to be waited for"""
    _submissions: int = 0
    _spans: list[VersionSpan] = field(default_factory=list)
    _first: int = 0
    """Where the current submission's tokens begin"""
    _sent_under: WeightId | None = None
    _stamps: ChunkStamps = field(default_factory=ChunkStamps)
    _routes: list[tuple[int, Routes]] = field(default_factory=list)

    @property
    def rid(self) -> str:
        """The latest submission's name. Each has its own: two seconds after a call is over, SGLang aborts all that was
        in it, by name."""
        request_id = self.request.request_id
        return request_id if self._submissions < 2 else f"{request_id}-{self._submissions}"

    @property
    def sampling_now(self) -> bool:
        return self.submitted and len(self.output_ids) > self._first

    def submit(self, weights: WeightId) -> GenerateRequest:
        """The request for what is missing, at the moment when it goes to a server that holds ``weights``."""
        self.submitted, self.cut_by = True, None
        self._submissions += 1
        self._first, self._sent_under, self._stamps = len(self.output_ids), weights, ChunkStamps()
        sampling = self.request.sampling
        return replace(
            self.request,
            request_id=self.rid,
            prompt_ids=[*self.request.prompt_ids, *self.output_ids],
            sampling=replace(sampling, max_new_tokens=sampling.max_new_tokens - len(self.output_ids)),
            resumed_tokens=self.request.resumed_tokens + len(self.output_ids),
        )

    def add(self, chunk: Chunk) -> None:
        label = str(chunk.meta.get("weight_version"))
        self._stamps.add(len(self.output_ids) - self._first, len(chunk.output_ids), label)
        self.output_ids += chunk.output_ids
        self.logprobs += chunk.logprobs

    def end_submission(self, chunk: Chunk | None, late: frozenset[WeightId]) -> None:
        """Settle the spans of the current submission; ``chunk`` is its last, None when it broke off.

        Raises ``EngineError`` for weights that nobody published.
        """
        assert self._sent_under is not None
        reported = None if chunk is None else reported_spans(chunk.meta)
        spans = self._stamps.spans if reported is None else reported
        count = len(self.output_ids) - self._first
        self._spans += shift_spans(exact_spans(spans, self._sent_under, late, count), self._first)
        self._first, self.submitted = len(self.output_ids), False

    def record(self, chunk: Chunk) -> None:
        """Keep the routed experts of a submission's last chunk. Raises ``EngineError`` where they are missing."""
        if self.routing is not None and (rows := self.routing.rows(chunk.meta, self._num_tokens)) is not None:
            self._routes.append((len(rows), rows))

    @property
    def _num_tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.output_ids)

    def generation(self, finish_reason: str) -> Generation:
        routes = lay_out(self._routes, self._num_tokens)
        return Generation(self.output_ids, self.logprobs, merge_spans(self._spans), finish_reason, routes)
