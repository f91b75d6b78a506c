"""Continuous batching: what runs when. A plain object that one thread steps; it knows no event loop.

::

    submit ─► waiting ─► (a free slot) prefill ─► running ─ one token per step ─► finished (stop | length | abort)

Each request's state is a row of columns, one per slot, so that a step is a handful of array operations, and Python
touches single requests only where one begins or ends.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from slime_async.actors.embedded.decoder import Decoder
from slime_async.actors.embedded.sampling import sample, uniforms
from slime_async.actors.engine import GenerateRequest, Generation, PauseMode
from slime_async.rows import most_rows
from slime_async.trajectory import VersionSpan, WeightId

NO_TOKEN = -1
"""Fills the stop list of a request that has fewer stop tokens than others"""
PREFILL_TOKENS = 8192
"""Prompts of equal length are run together up to about this many tokens, which bounds the memory of one prefill."""


@dataclass(slots=True, eq=False)
class _Request:
    request: GenerateRequest
    done: Callable[[Generation], None]
    limit: int
    """Tokens that may be sampled, the context's room considered"""
    seed: int
    slot: int = -1
    spans: list[VersionSpan] = field(default_factory=list)


class Scheduler:
    """Owns the decoder's slots. Everything is called from one thread, under ``torch.inference_mode``."""

    def __init__(self, decoder: Decoder, slots: int, weights: WeightId | None, *, fixed_slots: bool) -> None:
        """With ``fixed_slots`` every step computes all slots over the whole context and every prompt by itself.

        A matrix product's last bits depend on how many rows it has; so no request's result depends on its company.
        """
        self._decoder = decoder
        self._slots = slots
        self._fixed_slots = fixed_slots
        self.weights = weights
        self.paused = False
        self.generated_tokens = 0
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._free = list(range(slots))
        self._stale_cache = False
        context = decoder.max_context
        self._ids = np.zeros((slots, context), dtype=np.int64)
        """Prompt and sampled tokens"""
        self._logprobs = np.zeros((slots, context), dtype=np.float32)
        self._prompt = np.zeros(slots, dtype=np.int64)
        """Tokens of the prompt"""
        self._count = np.zeros(slots, dtype=np.int64)
        """Tokens sampled so far"""
        self._limit = np.zeros(slots, dtype=np.int64)
        self._active = np.zeros(slots, dtype=bool)
        self._seed = np.zeros(slots, dtype=np.uint64)
        self._shift = np.zeros(slots, dtype=np.int64)
        self._temperature = np.ones(slots, dtype=np.float32)
        self._top_p = np.ones(slots, dtype=np.float32)
        self._top_k = np.full(slots, -1, dtype=np.int64)
        self._stops = np.full((slots, 1), NO_TOKEN, dtype=np.int64)

    @property
    def _columns(self) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.generic]], ...]:
        """Everything that a request's slot holds besides its keys and values."""
        sampling = (self._seed, self._shift, self._temperature, self._top_p, self._top_k, self._stops)
        return (self._ids, self._logprobs, self._prompt, self._count, self._limit, self._active, *sampling)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return not self.paused and self.weights is not None and bool(self._waiting or self._running)

    # ------------------------------------------------------------------------------------------- between steps

    def submit(self, request: GenerateRequest, seed: int, done: Callable[[Generation], None]) -> None:
        room = self._decoder.max_context - len(request.prompt_ids)
        self._waiting.append(_Request(request, done, min(request.sampling.max_new_tokens, room), seed))

    def abort(self, request_id: str) -> None:
        """End one request with the tokens it has; unknown ids are of requests that have just finished."""
        for waiting in list(self._waiting):
            if waiting.request.request_id == request_id:
                self._waiting.remove(waiting)
                self._finish(waiting, "abort")
        for running in list(self._running.values()):
            if running.request.request_id == request_id:
                self._finish(running, "abort")

    def pause(self, mode: PauseMode) -> None:
        self.paused = True
        if mode is PauseMode.ABORT:
            for running in list(self._running.values()):
                self._finish(running, "abort")
        self._stale_cache = self._stale_cache or mode is PauseMode.RETRACT

    def resume(self) -> None:
        """After a pause with ``retract`` every running request's cache is computed again, with today's weights."""
        self.paused = False
        if self._stale_cache:
            self._stale_cache = False
            for requests in self._by_length(self._running.values(), lambda r: self._length(r) - 1):
                self._prefill(requests, [self._length(r) - 1 for r in requests])

    def use_weights(self, tensors: Iterable[tuple[str, Tensor]], weights: WeightId) -> None:
        """From the next sampled token on; what runs gets a new span."""
        self._decoder.load(tensors)
        self.weights = weights
        for slot, running in self._running.items():
            self._open_span(running, int(self._count[slot]))

    def abandon(self) -> dict[str, Generation]:
        """What every open request has, by its id; the scheduler is of no further use, its thread at its end."""
        open_requests = [*self._waiting, *self._running.values()]
        return {request.request.request_id: self._generation(request, "abort") for request in open_requests}

    # ---------------------------------------------------------------------------------------------------- steps

    def step(self) -> None:
        """Begin what there is room for, then one token for everything that runs."""
        self._admit()
        if not self._fixed_slots:
            self._close_gaps()
        if self._running:
            self._decode()

    def _admit(self) -> None:
        begun = []
        while self._waiting and self._free:
            request = self._waiting.popleft()
            if request.limit <= 0:
                self._finish(request, "length")
                continue
            request.slot = heapq.heappop(self._free)
            self._write_row(request)
            begun.append(request)
        for requests in self._by_length(begun, self._length):
            logits = self._prefill(requests, [self._length(r) for r in requests])
            for request in requests:
                self._running[request.slot] = request
                self._active[request.slot] = True
                self._open_span(request, 0)
            self._sample(np.array([r.slot for r in requests]), logits)

    def _close_gaps(self) -> None:
        """Move late stragglers to the front: what a step costs follows the number of requests, not the last slot."""
        while max(self._running, default=0) + 1 > most_rows(len(self._running)):
            source, target = max(self._running), heapq.heappop(self._free)
            request = self._running.pop(source)
            self._decoder.move(source, target, self._length(request))
            for column in self._columns:
                column[target] = column[source]
            self._active[source] = False
            heapq.heappush(self._free, source)
            request.slot = target
            self._running[target] = request

    def _decode(self) -> None:
        """Rows up to the last running one; rows without a request decode their last token again, unseen."""
        n = self._slots if self._fixed_slots else max(self._running) + 1
        rows = np.arange(n)
        last = np.maximum(self._prompt[:n] + self._count[:n] - 1, 0)
        longest = self._decoder.max_context if self._fixed_slots else int(last[self._active[:n]].max()) + 1
        last = np.minimum(last, longest - 1)
        ids = torch.from_numpy(self._ids[rows, last]).to(self._decoder.device)
        logits = self._decoder.decode(ids, torch.from_numpy(last).to(self._decoder.device), longest)
        slots = np.flatnonzero(self._active[:n])
        self._sample(slots, logits if len(slots) == n else logits[torch.from_numpy(slots).to(logits.device)])

    def _sample(self, slots: np.ndarray[tuple[int], np.dtype[np.int64]], logits: Tensor) -> None:
        """One token for each of ``slots`` from its row of ``logits``; ends the requests that are complete."""
        count = self._count[slots]
        uniform = uniforms(self._seed[slots], self._shift[slots] + count)
        device = logits.device
        tokens, logprobs = sample(
            logits,
            torch.from_numpy(uniform).to(device),
            torch.from_numpy(self._temperature[slots]).to(device),
            torch.from_numpy(self._top_p[slots]).to(device),
            torch.from_numpy(self._top_k[slots]).to(device),
        )
        sampled = tokens.cpu().numpy()
        at = self._prompt[slots] + count
        self._ids[slots, at] = sampled
        self._logprobs[slots, at] = logprobs.cpu().numpy()
        self._count[slots] = count + 1
        self.generated_tokens += len(slots)
        stopped = (self._stops[slots] == sampled[:, None]).any(1)
        ended = stopped | (count + 1 >= self._limit[slots])
        for i in np.flatnonzero(ended):
            self._finish(self._running[int(slots[i])], "stop" if stopped[i] else "length")

    def _prefill(self, requests: list[_Request], lengths: list[int]) -> Tensor:
        """Requests of one length; logits [n, V] of the token after each."""
        slots = np.array([request.slot for request in requests])
        ids = torch.from_numpy(self._ids[slots, : lengths[0]]).to(self._decoder.device)
        return self._decoder.prefill(ids, torch.from_numpy(slots).to(self._decoder.device))

    # --------------------------------------------------------------------------------------------------- rows

    def _by_length(self, requests: Iterable[_Request], length: Callable[[_Request], int]) -> Iterable[list[_Request]]:
        """Groups of equal length, each small enough for one prefill."""
        for n, group in itertools.groupby(sorted(requests, key=lambda r: (length(r), r.slot)), length):
            members = list(group)
            size = 1 if self._fixed_slots else max(1, PREFILL_TOKENS // n)
            for i in range(0, len(members), size):
                yield members[i : i + size]

    def _length(self, request: _Request) -> int:
        return int(self._prompt[request.slot] + self._count[request.slot])

    def _write_row(self, request: _Request) -> None:
        slot, sampling = request.slot, request.request.sampling
        prompt = request.request.prompt_ids
        self._ids[slot, : len(prompt)] = prompt
        self._prompt[slot], self._count[slot], self._limit[slot] = len(prompt), 0, request.limit
        self._seed[slot], self._shift[slot] = request.seed, request.request.resumed_tokens
        self._temperature[slot], self._top_p[slot] = sampling.temperature, sampling.top_p
        self._top_k[slot] = sampling.top_k
        missing = len(sampling.stop_token_ids) - self._stops.shape[1]
        if missing > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self._stops[slot] = NO_TOKEN
        self._stops[slot, : len(sampling.stop_token_ids)] = sampling.stop_token_ids

    def _open_span(self, request: _Request, first_token: int) -> None:
        assert self.weights is not None
        if request.spans and request.spans[-1].first_token == first_token:
            request.spans.pop()  # nothing was sampled with those weights
        request.spans.append(VersionSpan(first_token, self.weights))

    def _finish(self, request: _Request, reason: str) -> None:
        generation, slot = self._generation(request, reason), request.slot
        if slot >= 0:
            del self._running[slot]
            self._active[slot] = False
            heapq.heappush(self._free, slot)
        request.done(generation)

    def _generation(self, request: _Request, reason: str) -> Generation:
        slot, ids, logprobs = request.slot, [], []
        if slot >= 0:
            start, end = int(self._prompt[slot]), int(self._prompt[slot] + self._count[slot])
            ids, logprobs = self._ids[slot, start:end].tolist(), self._logprobs[slot, start:end].tolist()
        spans = tuple(span for span in request.spans if span.first_token < len(ids))
        return Generation(ids, logprobs, spans, reason)
