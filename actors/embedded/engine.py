"""``EmbeddedEngine``: the scheduler on a thread of its own, behind the ``Engine`` protocol.

Consumes requests and commands through an inbox that the decode thread empties between two steps; waits only for that
inbox; is unblocked by every submission; produces results on the event loop's thread. When the decode thread dies, every
open and later call raises ``EngineError`` with what it died of.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from slime_async.actors.embedded.checkpoint import read_config, read_tensors
from slime_async.actors.embedded.decoder import Decoder
from slime_async.actors.embedded.scheduler import Scheduler
from slime_async.actors.engine import (
    BusySpan,
    EngineError,
    EngineStatus,
    GenerateRequest,
    Generation,
    PauseMode,
    check_request,
)
from slime_async.protocol import SharedTensor, WeightGroupSpec, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.shared_tensors import open_tensor
from slime_async.transport.threads import in_daemon_thread
from slime_async.transport.weight_group import WeightGroup
from slime_async.transport.weight_layout import shares_of

CLOSE_TIMEOUT_S = 10.0
"""The longest that one step may still take when the engine is closed."""

Result = TypeVar("Result")


class EmbeddedEngine:
    """One engine on one device. Create it on any thread; use it from one event loop."""

    num_ranks = 1
    takes_buffers = True

    def __init__(
        self,
        checkpoint: Path,
        *,
        engine_id: str = "embedded-0",
        slots: int = 128,
        max_context: int = 4096,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
        fixed_slots: bool = False,
        weights: WeightId | None = None,
        on_busy: BusySpan | None = None,
    ) -> None:
        """With ``weights`` the checkpoint's tensors are served under that name; without, the first broadcast's.

        Raises ``ValueError`` for checkpoints that the decoder cannot run.
        """
        self.engine_id = engine_id
        self._checkpoint = checkpoint
        self._config = read_config(checkpoint)
        self._device = torch.device(device)
        self._max_context = min(max_context, self._config.max_position_embeddings)
        self._threads = threads
        self._on_busy = on_busy
        decoder = self._decoder = Decoder(
            self._config, slots=slots, max_context=self._max_context, dtype=dtype, device=self._device
        )
        self._scheduler = Scheduler(decoder, slots, weights, fixed_slots=fixed_slots)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wakeup = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[asyncio.Future[Generation]] = set()
        self._requests: dict[asyncio.Future[Generation], str] = {}
        self._groups: list[WeightGroup] = []
        self.in_flight_at_update = 0
        """Requests that were being sampled when the last weights arrived"""

    # ------------------------------------------------------------------------------------------------- protocol

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"decode {self.engine_id}", daemon=True)
        self._thread.start()
        if self._scheduler.weights is not None:
            weights = self._scheduler.weights
            try:
                await self._command(lambda: self._scheduler.use_weights(read_tensors(self._checkpoint), weights))
            except ValueError as error:
                await self.close()
                raise EngineError(f"engine {self.engine_id} could not load its weights: {error}") from error

    async def generate(self, request: GenerateRequest) -> Generation:
        check_request(request, self._config.vocab_size, self._max_context)
        self._check_alive()
        assert self._loop is not None
        loop, future = self._loop, self._loop.create_future()
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)

        def done(generation: Generation) -> None:
            loop.call_soon_threadsafe(_resolve, future, generation)

        self._open.add(future)
        self._requests[future] = request.request_id
        self._post(lambda: self._scheduler.submit(request, seed, done))
        try:
            generation: Generation = await future
            return generation
        except asyncio.CancelledError:
            self._post(lambda: self._scheduler.abort(request.request_id))
            raise
        finally:
            self._open.discard(future)
            del self._requests[future]

    async def abort(self, request_id: str) -> None:
        await self._command(lambda: self._scheduler.abort(request_id))

    async def pause(self, mode: PauseMode) -> None:
        await self._command(lambda: self._scheduler.pause(mode))

    async def resume(self) -> None:
        await self._command(self._scheduler.resume)

    async def join_weight_group(
        self, spec: WeightGroupSpec, rank_offset: int, others: Sequence[WeightGroupSpec] = ()
    ) -> None:
        self._check_alive()
        await self._leave_groups()
        for one in (spec, *others):
            joining = in_daemon_thread(partial(WeightGroup.create, one, rank_offset), f"join {self.engine_id}")
            try:
                self._groups.append(await asyncio.wrap_future(joining))
            except asyncio.CancelledError:
                joining.add_done_callback(_leave)  # the thread goes on: a member that nobody knows of would stay
                raise

    async def check_weights(self, manifest: WeightManifest) -> None:
        self._decoder.check_shapes({tensor.name: tensor.shape for tensor in manifest.tensors})

    async def receive_weights(
        self,
        manifest: WeightManifest,
        weights: WeightId,
        shared: Sequence[SharedTensor] = (),
        shares: Sequence[int] = (),
        buffer_bytes: int = 0,
    ) -> None:
        self._check_alive()
        if shared:
            opened = ((spec.name, open_tensor(spec, one)) for spec, one in zip(manifest.tensors, shared, strict=True))
            tensors = dict(opened)
        else:
            tensors = await self._receive_broadcast(manifest, shares, buffer_bytes)

        def use() -> None:
            self.in_flight_at_update = self._scheduler.running
            self._scheduler.use_weights(tensors.items(), weights)

        await self._command(use)

    async def _receive_broadcast(
        self, manifest: WeightManifest, shares: Sequence[int], buffer_bytes: int
    ) -> dict[str, Tensor]:
        if not self._groups:
            raise EngineError(f"engine {self.engine_id} is in no weight group: join one before receiving weights")
        tensors: dict[str, Tensor] = {}
        for group, part in zip(self._groups, shares_of(manifest, shares, len(self._groups)), strict=True):
            receive = partial(group.receive, part, self._device, buffer_bytes)
            receiving = in_daemon_thread(receive, f"receive {self.engine_id}")
            try:
                received = await asyncio.wrap_future(receiving)
            except asyncio.CancelledError:
                self._groups.remove(group)
                in_daemon_thread(group.close, f"leave {self.engine_id}")  # half a broadcast taken: of no further use
                raise
            tensors |= received
        return tensors

    async def status(self) -> EngineStatus:
        self._check_alive()
        scheduler = self._scheduler
        return EngineStatus(
            self.engine_id,
            scheduler.weights,
            scheduler.paused,
            scheduler.running,
            scheduler.waiting,
            scheduler.generated_tokens,
        )

    async def check_health(self) -> None:
        self._check_alive()

    async def close(self) -> None:
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        await self._leave_groups()
        self._fail_open(f"engine {self.engine_id} was closed")

    # ------------------------------------------------------------------------------------------ event loop's side

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineError(f"engine {self.engine_id} died: {self._failure}") from self._failure
        if self._thread is None or self._closing:
            raise EngineError(f"engine {self.engine_id} is not running: start it first, and not after close")

    async def _command(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the decode thread between two steps; returns when it is done, raises what it raised."""
        self._check_alive()
        assert self._loop is not None
        loop, future = self._loop, self._loop.create_future()

        def run() -> None:
            try:
                action()
            except ValueError as error:  # a wrong argument (weights of another shape) is the caller's, not fatal
                loop.call_soon_threadsafe(_reject, future, error)
            else:
                loop.call_soon_threadsafe(_resolve, future, None)

        self._open.add(future)
        self._post(run)
        try:
            await future
        finally:
            self._open.discard(future)

    async def _leave_groups(self) -> None:
        groups, self._groups = self._groups, []
        for group in groups:
            await asyncio.to_thread(group.close)

    def _fail_open(self, message: str, cause: BaseException | None = None) -> None:
        """After the decode thread's end: every open call raises, requests with what they have."""
        sampled = self._scheduler.abandon()
        for future in list(self._open):
            error = EngineError(message)
            error.__cause__ = cause
            error.partial = sampled.get(self._requests.get(future, ""))
            _reject(future, error)

    # ------------------------------------------------------------------------------------------ decode thread's side

    def _post(self, action: Callable[[], None]) -> None:
        with self._wakeup:
            self._inbox.append(action)
            self._wakeup.notify()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                self._loop_until_closed()
        except BaseException as error:  # noqa: BLE001 - the border of a thread: every caller is told
            self._failure = error
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._fail_open, f"engine {self.engine_id} died: {error}", error)

    def _loop_until_closed(self) -> None:
        busy_since: int | None = None
        while True:
            with self._wakeup:
                if not self._inbox and not self._closing and not self._scheduler.has_work:
                    self._report_busy(busy_since)
                    busy_since = None
                    self._wakeup.wait_for(lambda: self._inbox or self._closing)
                if self._closing:
                    self._report_busy(busy_since)
                    return
                actions, self._inbox = self._inbox, deque()
            for action in actions:
                action()
            if self._scheduler.has_work:
                busy_since = busy_since or time.monotonic_ns()
                self._scheduler.step()

    def _report_busy(self, since: int | None) -> None:
        """A stretch of computing ends here, if there was one."""
        if since is not None and self._on_busy is not None:
            self._on_busy(since, time.monotonic_ns())


def _resolve(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _leave(joining: Future[WeightGroup]) -> None:
    """Close the group that a call formed after its caller had gone; what failed to form needs nothing."""
    if joining.exception() is None:
        joining.result().close()


def _reject(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
