"""``SGLangEngine``: one SGLang server, its own child or somebody else's by URL, behind the ``Engine`` protocol.

::

    generate ─► door ─► gate ─► /generate (streamed) ─► chunk, chunk … ─► answer
                 │       │ closed while paused and while there are no weights: what is sent under one cache key is
                 │       │ computed with that key's weights, save what waits in the server when they change
                 │ requests enter in bunches, because a prefill holds up everything that decodes, and only as many
                 │ as the server decodes at once
    pause(in_place, retract) ─► gate closes ─► /pause_generation
    pause(abort)             ─► gate closes ─► /abort_request until nothing runs ─► /pause_generation

Consumes requests; waits for the server, each time with a deadline or beside ``check_health``, which notices a server
that samples nothing; is unblocked by weights and by ``resume``. When the server dies, every open call raises
``EngineError`` with what had been sampled (``partial``); the engine does not come back, its pool makes another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from slime_async.actors.embedded.checkpoint import read_shapes
from slime_async.actors.engine import (
    BusySpan,
    EngineError,
    EngineStatus,
    GenerateRequest,
    Generation,
    PauseMode,
    check_request,
)
from slime_async.actors.sglang.answers import Answer
from slime_async.actors.sglang.client import EngineRefused, SGLangClient, generate_body, running_at_most
from slime_async.actors.sglang.door import Door
from slime_async.actors.sglang.loader import LOADER
from slime_async.actors.sglang.model import ModelFacts
from slime_async.actors.sglang.routing import REMEDY
from slime_async.actors.sglang.server import POLL_S, LaunchSpec, ServerProcess
from slime_async.actors.sglang.updates import CONTROL_TIMEOUT_S, ServerStuck, WeightUpdates
from slime_async.actors.sglang.versions import (
    READY_PATHS_EXTERNAL,
    READY_PATHS_OWN,
    Features,
    cache_key,
    features_of,
    weight_label,
)
from slime_async.addresses import is_loopback
from slime_async.protocol import SharedTensor, WeightGroupSpec, WeightManifest
from slime_async.trajectory import WeightId

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 10.0
"""For ``/ready``, which asks nobody but the web server"""
ABORT_AGAIN_S = 0.05
"""Requests may be on their way when all are aborted: asked again until none is left"""
LATE_WEIGHTS_KEPT = 64
"""More versions than any answer spans"""


class SGLangEngine:
    """Use it from one event loop. ``launch`` says how to start a server of its own, ``url`` where another runs."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        engine_id: str,
        launch: LaunchSpec | None = None,
        url: str = "",
        max_context: int = 4096,
        weights: WeightId | None = None,
        startup_timeout_s: float = 600.0,
        stall_timeout_s: float = 120.0,
        call_bytes: int = 8 << 30,
        api_key: str = "",
        admin_key: str = "",
        record_routing: bool = False,
        prefill_fraction: float = 0.0,
        prefill_wait_s: float = 0.0,
        on_busy: BusySpan | None = None,
    ) -> None:
        """With ``weights`` the server's own are served under that name; without, the first broadcast's.

        Weights that come tensor by tensor do so in calls of at most ``call_bytes``. ``record_routing``: answers say
        which experts they took. Requests wait for others to enter with, ``prefill_fraction`` of those that the server
        has, but not for longer than ``prefill_wait_s`` once the server can decode them.

        Raises ``ValueError`` for checkpoints that name no vocabulary, for experts to be recorded of a model that has
        none, and unless one of ``launch``, ``url`` is given.
        """
        if (launch is None) == (not url):
            raise ValueError(f"engine {engine_id}: give either a way to launch a server or the URL of one")
        self.engine_id = engine_id
        self._name = f"engine {engine_id}"
        self._model = ModelFacts.read(checkpoint)
        if record_routing and self._model.routing is None:
            raise ValueError(f"{checkpoint} is no mixture of experts: set actor.record_routing = false")
        self._routing = self._model.routing if record_routing else None
        self._max_context = min(max_context, self._model.max_positions)
        self._launch, self._url = launch, url
        self._keys = {"api_key": api_key, "admin_key": admin_key}
        self._weights = weights
        self._startup_timeout_s, self._stall_timeout_s = startup_timeout_s, stall_timeout_s
        self._call_bytes = call_bytes
        self._door = Door(prefill_fraction, prefill_wait_s)
        self._on_busy = on_busy
        self._busy_since: int | None = None
        self._server: ServerProcess | None = None
        self._client: SGLangClient | None = None
        self._features: Features | None = None
        self._overlap = self._seeded = False
        self._failure: EngineError | None = None
        self._paused: PauseMode | None = None
        self._changed = asyncio.Condition()
        self._answers: dict[str, Answer] = {}
        self._updates: WeightUpdates | None = None
        self._late: tuple[WeightId, ...] = ()
        self._generated = 0
        self._progress_at = 0.0
        self._background: set[asyncio.Task[None]] = set()
        self.num_ranks = 1
        self.takes_buffers = False
        self.in_flight_at_update = 0

    # --------------------------------------------------------------------------------------------------- life cycle

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException as error:
            await self.close()
            if isinstance(error, EngineError | ValueError):
                raise EngineError(f"{self._name} could not start: {error}") from error
            raise

    async def _start(self) -> None:
        if self._weights is not None:
            read_shapes(self._model.checkpoint)  # what is missing is said here in a word, by the server in a page
        if self._launch is None:
            client = self._client = SGLangClient(self._url, self._name, ready_paths=READY_PATHS_EXTERNAL, **self._keys)
            await self._find(client)
        else:
            server = self._server = await ServerProcess.launch(self._launch)
            client = self._client = SGLangClient(server.url, self._name, ready_paths=READY_PATHS_OWN, **self._keys)
            await server.wait_ready(lambda: client.ready(HEALTH_TIMEOUT_S), self._startup_timeout_s)
        info = await client.server_info(CONTROL_TIMEOUT_S)
        if self._routing is not None and not info.get("enable_return_routed_experts"):
            raise EngineError(f"the server at {client.url} does not record routed experts: {REMEDY}")
        self._features = features_of(str(info.get("version")))
        self._overlap = not info.get("disable_overlap_schedule", False)
        if self._routing is not None and self._overlap and not self._features.records_overlapped:
            raise EngineError(
                f"SGLang {self._features.version} records routed experts wrongly under overlap scheduling: start it "
                "with --disable-overlap-schedule, or install 0.5.23"
            )
        self._seeded = bool(info.get("enable_deterministic_inference", False))
        self.num_ranks = int(info.get("tp_size", 1)) * int(info.get("pp_size", 1))
        self.takes_buffers = self._has_our_loader(client, info)
        self._door.capacity = running_at_most(info)
        self._updates = WeightUpdates(
            client,
            self._features,
            self._name,
            call_bytes=self._call_bytes,
            ranks=int(info.get("tp_size", 1)),
        )
        self._progress_at = time.monotonic()
        log.info("%s: SGLang %s at %s, %d ranks", self._name, self._features.version, client.url, self.num_ranks)

    def _has_our_loader(self, client: SGLangClient, info: Mapping[str, Any]) -> bool:
        """Of failures it tells in files: on this machine. A draft model would load the weights a second time."""
        loaders = info.get("custom_weight_loader") or ()
        return LOADER in loaders and is_loopback(client.url) and not info.get("speculative_algorithm")

    async def _find(self, client: SGLangClient) -> None:
        """Until somebody else's server answers; it may be paused."""
        deadline = time.monotonic() + self._startup_timeout_s
        while True:
            try:
                await client.ready(HEALTH_TIMEOUT_S)
            except EngineError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(POLL_S)
            else:
                return

    async def close(self) -> None:
        await self._fail(EngineError(f"{self._name} was closed"))
        if self._client is not None:
            if self._updates is not None and self._launch is None:
                await self._updates.leave()
            await self._client.close()
        if self._server is not None:
            await self._server.kill()

    async def status(self) -> EngineStatus:
        self._check_alive()
        sampling = sum(answer.sampling_now for answer in self._answers.values())
        return EngineStatus(
            self.engine_id,
            self._weights,
            self._paused is not None,
            sampling,
            len(self._answers) - sampling,
            self._generated,
        )

    async def check_health(self) -> None:
        client = self._check_alive()
        was_paused = self._paused
        ready = await client.ready(HEALTH_TIMEOUT_S)
        if not ready and was_paused is None and self._paused is None:
            raise EngineError(f"{self._name} says that it is not ready, though nobody paused it")
        busy = self._paused is None and any(answer.submitted for answer in self._answers.values())
        silent_s = time.monotonic() - self._progress_at
        if busy and silent_s > self._stall_timeout_s:
            raise EngineError(
                f"{self._name} has {len(self._answers)} requests and sampled nothing for {silent_s:.0f} s"
            )

    # ----------------------------------------------------------------------------------------------------- answers

    async def generate(self, request: GenerateRequest) -> Generation:
        check_request(request, self._model.vocab_size, self._max_context)
        self._check_alive()
        if request.request_id in self._answers:
            raise ValueError(f"request {request.request_id} runs already: ids must be unique (UUIDs)")
        answer = self._answers[request.request_id] = Answer(request, self._routing)
        try:
            return await self._answer(answer)
        except EngineRefused:
            raise
        except EngineError as error:
            broken = EngineError(str(self._failure or error))
            broken.partial = answer.generation("abort")
            raise broken from error
        except asyncio.CancelledError:
            self._abort_in_background(answer.rid)
            raise
        finally:
            del self._answers[request.request_id]

    async def _answer(self, answer: Answer) -> Generation:
        """Submit until the server says stop or length, or the owner aborts; pauses may cut it in between."""
        request = answer.request
        limit = min(request.sampling.max_new_tokens, self._max_context - len(request.prompt_ids))
        async with self._door.passed(request.request_id, again=request.resumed_tokens > 0):
            while True:
                weights = await self._gate(answer)
                if weights is None:
                    return answer.generation("abort")
                reason = await self._submit(answer, weights, limit - len(answer.output_ids))
                if reason != "abort":
                    return answer.generation(reason)
                if len(answer.output_ids) >= limit:
                    return answer.generation("length")
                # a retracted answer goes on, and one that a pause cut before it began has lost nothing
                goes_on = answer.cut_by is PauseMode.RETRACT or (answer.cut_by and not answer.output_ids)
                if answer.aborted or not goes_on:
                    return answer.generation("abort")

    async def _submit(self, answer: Answer, weights: WeightId, max_new_tokens: int) -> str:
        """One exchange with the server; why it ended."""
        client = self._check_alive()
        body = generate_body(
            answer.submit(weights),
            max_new_tokens,
            cache_key(weights),
            seeded=self._seeded,
            record_routing=self._routing is not None,
        )
        self._note_business()
        if not any(other.submitted for other in self._answers.values() if other is not answer):
            self._progress_at = time.monotonic()  # nothing was asked of the server before
        chunk = None
        try:
            async with asyncio.timeout(None) as answer.cutoff, aclosing(client.generate(body)) as chunks:
                async for chunk in chunks:
                    answer.add(chunk)
                    self._generated += len(chunk.output_ids)
                    self._progress_at = time.monotonic()
        except TimeoutError as error:
            raise EngineError(str(self._failure)) from error
        finally:
            finished = chunk if chunk is not None and chunk.finish_reason is not None else None
            answer.end_submission(finished, frozenset(self._late))
            self._note_business()
            await self._notify()
        assert finished is not None
        assert finished.finish_reason is not None
        answer.record(finished)
        return finished.finish_reason

    def _note_business(self) -> None:
        """The server computes while it has requests and is not paused; a stretch of that ends or begins here."""
        busy = self._paused is None and any(answer.submitted for answer in self._answers.values())
        if busy and self._busy_since is None:
            self._busy_since = time.monotonic_ns()
        elif not busy and self._busy_since is not None:
            since, self._busy_since = self._busy_since, None
            if self._on_busy is not None:
                self._on_busy(since, time.monotonic_ns())

    async def _gate(self, answer: Answer) -> WeightId | None:
        """The weights to sample with, once there are some and nobody pauses; None for an answer aborted meanwhile."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._failure or answer.aborted or (self._weights and self._paused is None)
            )
        self._check_alive()
        return None if answer.aborted else self._weights

    async def abort(self, request_id: str) -> None:
        self._check_alive()
        answer = self._answers.get(request_id)
        if answer is None:
            return  # just finished, or a prefix of another's id, which the server would take for that
        answer.aborted = True
        if answer.submitted:
            await self._abort_in_server(answer.rid)
        else:
            self._door.excuse(request_id)
        await self._notify()

    async def _abort_in_server(self, rid: str) -> None:
        await self._check_alive().post("/abort_request", {"rid": rid}, CONTROL_TIMEOUT_S)

    def _abort_in_background(self, rid: str) -> None:
        """For an owner who has left: the server would find out by itself, but later."""

        async def abort() -> None:
            try:
                await self._abort_in_server(rid)
            except EngineError as error:
                if self._failure is None:  # else the server goes, and its requests with it
                    log.warning("request %s was given up, but not taken back: %s", rid, error)

        task = asyncio.create_task(abort(), name=f"abort {rid}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ----------------------------------------------------------------------------------------------------- weights

    async def pause(self, mode: PauseMode) -> None:
        client = self._check_alive()
        assert self._features is not None
        self._paused = mode
        self._door.shut()
        self._note_business()
        if mode is PauseMode.ABORT or (mode is PauseMode.RETRACT and not self._features.flushes_retracted):
            await self._cut_all(client, mode)
            mode = PauseMode.IN_PLACE  # nothing is left to be cut; what comes now waits
        await client.post("/pause_generation", {"mode": mode.value}, CONTROL_TIMEOUT_S)

    async def _cut_all(self, client: SGLangClient, mode: PauseMode) -> None:
        """End everything in the server. (SGLang's own abort mode looks only once a second whether that is done.)"""
        async with asyncio.timeout(CONTROL_TIMEOUT_S):
            while open_answers := [answer for answer in self._answers.values() if answer.submitted]:
                for answer in open_answers:
                    answer.cut_by = mode
                await client.post("/abort_request", {"rid": "", "abort_all": True}, CONTROL_TIMEOUT_S)
                await self._until(lambda: not any(a.submitted for a in self._answers.values()), ABORT_AGAIN_S)

    async def resume(self) -> None:
        await self._check_alive().post("/continue_generation", {"torch_empty_cache": False}, CONTROL_TIMEOUT_S)
        self._paused = None
        self._door.open()
        self._note_business()
        self._progress_at = time.monotonic()
        await self._notify()

    async def join_weight_group(
        self, spec: WeightGroupSpec, rank_offset: int, others: Sequence[WeightGroupSpec] = ()
    ) -> None:
        updates = self._check_updates()
        try:
            await updates.join((spec, *others), rank_offset)
        except ServerStuck as error:
            await self._fail(error)
            raise

    async def check_weights(self, manifest: WeightManifest) -> None:
        self._model.check_manifest(manifest)

    async def receive_weights(
        self,
        manifest: WeightManifest,
        weights: WeightId,
        shared: Sequence[SharedTensor] = (),
        shares: Sequence[int] = (),
        buffer_bytes: int = 0,
    ) -> None:
        updates = self._check_updates()

        def update(label: str, flush: bool) -> Awaitable[None]:
            if shared:
                return updates.open_shared(manifest, shared, label, flush=flush)
            if buffer_bytes:
                return updates.broadcast_buffers(manifest, shares, buffer_bytes, label, flush=flush)
            return updates.broadcast(manifest, shares, label, flush=flush)

        await self._use(weights, update)

    async def _use(self, weights: WeightId, update: Callable[[str, bool], Awaitable[None]]) -> None:
        """Replace the weights by what ``update`` brings. Where it fails, the engine is left without any."""
        assert self._features is not None
        self.in_flight_at_update = sum(answer.sampling_now for answer in self._answers.values())
        # under in_place SGLang refuses to flush: the cache key of later requests does the same
        flush = self._paused is PauseMode.RETRACT and self._features.flushes_retracted
        self._weights = None
        try:
            await update(weight_label(weights), flush)
        except ServerStuck as error:
            await self._fail(error)
            raise
        if self._overlap and self._paused in (None, PauseMode.IN_PLACE):
            self._late = (*self._late, weights)[-LATE_WEIGHTS_KEPT:]
        self._weights = weights
        await self._notify()

    # ------------------------------------------------------------------------------------------------------ common

    def _check_alive(self) -> SGLangClient:
        if self._failure is not None:
            raise EngineError(str(self._failure))
        if self._client is None:
            raise EngineError(f"{self._name} is not running: start it first, and not after close")
        if self._server is not None:
            try:
                self._server.check()
            except EngineError as error:
                raise EngineError(f"{self._name}: {error}") from error
        return self._client

    async def _fail(self, failure: EngineError) -> None:
        """The first reason stays; whoever waits, at the gate or for the server, is told."""
        self._failure = self._failure or failure
        for answer in self._answers.values():
            if answer.submitted and answer.cutoff is not None and not answer.cutoff.expired():
                answer.cutoff.reschedule(0)
        self._door.excuse_all()
        await self._notify()

    def _check_updates(self) -> WeightUpdates:
        self._check_alive()
        assert self._updates is not None
        return self._updates

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Until ``holds``, or until ``timeout_s`` is over."""
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(holds)
            except TimeoutError:
                return
