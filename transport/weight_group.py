"""The process group that carries weights from a source rank of the learner (0) to every engine rank.

It lives beside whatever default group the process has (there may be none) and registers nothing globally, so that
groups come and go as engines do::

    learner                                             engine ranks 1 … n
    host_group()      ── the spec, told by message ──►
    WeightGroup.create(spec, 0)  ◄── TCPStore ──►       WeightGroup.create(spec, rank)
    send(tensors)     ──── one broadcast of each ───►   receive(manifest)
    close()                                             close()

Rendezvous and key prefixes are those of ``torch.distributed``'s own constructors (``tcp://`` store, a prefix for the
group's name, one for the process group, one for its device), so that SGLang's ``/init_weights_update_group`` joins.

Every wait ends at ``spec.timeout_s``. A peer that dies in a broadcast breaks the group for everyone: close it and form
the next one. NCCL connects in the first broadcast, gloo while the group is formed.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from slime_async.protocol import WeightGroupSpec, WeightManifest
from slime_async.transport.threads import in_daemon_thread
from slime_async.transport.weight_layout import buffers_of, torch_dtype

logger = logging.getLogger(__name__)
T = TypeVar("T")

STORE_GRACE_S = 2.0
"""torch's store counts whole seconds and overruns by one; its own error, which says how many joined, is the better."""

CLOSE_TIMEOUT_S = 5.0
"""How long closing may take before the group's threads are left to die with the process."""


class WeightGroupError(RuntimeError):
    """A weight group could not be formed or broke. The message names the group, this rank and the cause."""


class WeightGroupTimeoutError(WeightGroupError, TimeoutError):
    """The group's deadline passed: somebody did not join, or did not take part in a broadcast."""


def host_group(
    name: str,
    epoch: int,
    world_size: int,
    backend: Literal["gloo", "nccl"],
    timeout_s: float,
    address: str = "127.0.0.1",
) -> tuple[WeightGroupSpec, TCPStore]:
    """Host the store of membership ``epoch`` on a free port, so that engines can be told before everybody joins.

    ``world_size`` counts the learner's source rank and all engine ranks; ``address`` is what engines can reach this
    process by. The store listens on every interface and knows no authentication: keep its port inside the cluster.
    Hold on to the store until ``WeightGroup.create(spec, 0)`` has returned.
    """
    if world_size < 2:
        raise ValueError(f"world_size is {world_size}: a weight group needs the learner and at least one engine rank")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}: must be positive")
    listener = listen()
    # multi_tenant: create() opens the same server again, which is what counts who has joined. It is found by its port,
    # under which torch keeps a server of the past if it has chosen the port itself: so it is told ours.
    store = TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
    spec = WeightGroupSpec(
        name=f"{name}-{epoch}",
        epoch=epoch,
        master_address=address,
        master_port=store.port,
        world_size=world_size,
        backend=backend,
        timeout_s=timeout_s,
    )
    return spec, store


def listen(port: int = 0) -> socket.socket:
    """A socket that listens on every interface; 0 takes a free port."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # a kernel that knows IPv6, on a machine where it is switched off
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


@dataclass(frozen=True, slots=True)
class Transfer:
    """How the tensors after the first went over. The first is left out: it waits for the receivers."""

    bytes: int
    seconds: float
    """From the end of the first one's broadcast to the end of the last one's, on CUDA by the device's clock"""

    @property
    def rate(self) -> float:
        """Bytes per second; 0 where only one tensor went over."""
        return self.bytes / self.seconds if self.seconds else 0.0


class WeightGroup:
    """One rank's membership. Not thread-safe: one call at a time."""

    def __init__(self, spec: WeightGroupSpec, rank: int, process_group: Any) -> None:
        self.spec = spec
        self.rank = rank
        self.transfer = Transfer(0, 0.0)
        """Of the last broadcast"""
        self._process_group: Any = process_group
        self._broken: str | None = None

    @classmethod
    def create(cls, spec: WeightGroupSpec, rank: int) -> WeightGroup:
        """Join as ``rank``; blocks until all have joined.

        Raises ``WeightGroupTimeoutError`` when they have not within ``spec.timeout_s``, ``WeightGroupError`` when the
        store cannot be reached.
        """
        if not 0 <= rank < spec.world_size:
            raise ValueError(f"rank {rank} does not exist in weight group {spec.name!r} of {spec.world_size} ranks")
        joining = in_daemon_thread(lambda: _connect(spec, rank), f"join-{spec.name}-{rank}")
        waiting_s = spec.timeout_s + STORE_GRACE_S
        return cls(spec, rank, _outcome(joining, spec, rank, "not everybody joined", waiting_s))

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        unless: Sequence[Future[Any]] = (),
        device: torch.device | None = None,
    ) -> None:
        """Rank 0: broadcast the tensors in order, in the dtype and on the device they have; blocks until sent.

        ``tensors`` is iterated on another thread, on CUDA with a stream of its own on ``device`` (None: the process's
        first): what is still in the making there must make that stream wait before it is yielded. As soon as one of
        ``unless`` fails (an engine said that it will not receive), the broadcast is given up.
        Returning says that this rank's part is done: a receiver further down the tree may have failed, so wait for
        every engine's acknowledgement before counting on it.
        Raises ``WeightGroupError`` when a peer died or ``spec.timeout_s`` passed; the group is broken then.
        """
        if self.rank != 0:
            raise ValueError(f"rank {self.rank} of weight group {self.spec.name!r} cannot send: rank 0 does")
        contiguous = (tensor.detach().contiguous() for _, tensor in tensors)
        self._run(lambda: self._broadcast_beside(contiguous, device), "send", unless)

    def receive(
        self, manifest: WeightManifest, device: torch.device | str = "cpu", buffer_bytes: int = 0
    ) -> dict[str, Tensor]:
        """Engine ranks: take part in a manifest's broadcasts; the tensors by name, freshly allocated on ``device``.

        With ``buffer_bytes`` they come side by side, as ``buffers_of`` lays them out; else each by itself.
        Raises ``WeightGroupError`` when a peer died or ``spec.timeout_s`` passed; the group is broken then.
        """
        if self.rank == 0:
            raise ValueError(f"rank 0 of weight group {self.spec.name!r} cannot receive: it sends")
        if not buffer_bytes:
            received = {
                spec.name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device)
                for spec in manifest.tensors
            }
            self._run(lambda: self._broadcast(received.values()), "receive")
            return received
        layouts = buffers_of(manifest, buffer_bytes)
        buffers = [torch.empty(layout.nbytes, dtype=torch.uint8, device=device) for layout in layouts]
        self._run(lambda: self._broadcast(buffers), "receive")
        pairs = zip(layouts, buffers, strict=True)
        return {name: tensor for layout, buffer in pairs for name, tensor in layout.views(buffer)}

    def close(self) -> None:
        """Leave the group; its sockets and threads go. Idempotent. A broadcast of others breaks by it."""
        held, self._process_group = [self._process_group], None
        if held[0] is None:
            return
        # the last reference goes on that thread: gloo's destructor waits for what is still in flight
        leaving = in_daemon_thread(lambda: held.pop().abort(), f"leave-{self.spec.name}-{self.rank}")
        try:
            leaving.result(CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.error("weight group %r: rank %d could not be aborted; restart it", self.spec.name, self.rank)

    def _broadcast_beside(self, tensors: Iterable[Tensor], device: torch.device | None) -> None:
        """On a stream of its own, so that nothing that the process computes meanwhile is waited for."""
        if self.spec.backend == "gloo":
            self._broadcast(tensors)
            return
        with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            self._broadcast(tensors)

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Queue one broadcast per tensor, then wait for all; tensors stay referenced until the last is through."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self.spec.timeout_s)
        sent: list[Tensor] = []
        works: deque[Any] = deque()
        clock = _Clock()
        try:
            for tensor in tensors:
                sent.append(tensor)
                works.append(self._process_group.broadcast([tensor], options))
                if tensor.is_cuda and len(sent) == 1:
                    works[0].wait()  # without a deadline it is the stream that waits, not the caller
                    clock.begin(tensor.device)
            while works:
                works.popleft().wait(options.timeout)
                clock.begin()
            self.transfer = Transfer(sum(tensor.nbytes for tensor in sent[1:]), clock.end_s())
        finally:
            works.clear()  # held by a traceback, they would keep the group's threads and sockets

    def _run(self, collective: Callable[[], None], what: str, unless: Sequence[Future[Any]] = ()) -> None:
        if self._process_group is None or self._broken is not None:
            reason = self._broken or "it was closed"
            raise WeightGroupError(f"weight group {self.spec.name!r} is unusable ({reason}): form a new one")
        running = in_daemon_thread(collective, f"{what}-{self.spec.name}-{self.rank}")
        try:
            left_s = self._watch(running, unless)
            _outcome(running, self.spec, self.rank, f"{what} did not finish", left_s)
        except Exception as error:  # an iterator of tensors may raise anything; peers have taken a part by then
            self._broken = str(error)
            self.close()  # wakes the thread that is stuck in the collective, here and at the peers
            raise

    def _watch(self, running: Future[None], unless: Sequence[Future[Any]]) -> float:
        """Until ``running`` is done or its deadline passes; the seconds left. Raises when one of ``unless`` fails."""
        deadline = time.monotonic() + self.spec.timeout_s
        awaited = set(unless)
        while not running.done() and (left_s := deadline - time.monotonic()) > 0:
            done, _ = wait({running, *awaited}, left_s, FIRST_COMPLETED)
            for call in done & awaited:
                if (error := call.exception()) is not None:
                    raise WeightGroupError(f"weight group {self.spec.name!r}: given up, as another says: {error}")
            awaited -= done
        return max(0.0, deadline - time.monotonic())


class _Clock:
    """Of the tensors' device where that is a GPU: what is queued there ends later than the calls that queue it."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._begun: float | torch.cuda.Event | None = None

    def begin(self, device: torch.device | None = None) -> None:
        """The first call counts."""
        if self._begun is None:
            self._device = device
            self._begun = time.perf_counter() if device is None else _event(device)

    def end_s(self) -> float:
        """Seconds since then; on a GPU once everything queued until now is done. 0 without a beginning."""
        if isinstance(self._begun, float):
            return time.perf_counter() - self._begun
        if self._begun is None or self._device is None:
            return 0.0
        end = _event(self._device)
        end.synchronize()
        return float(self._begun.elapsed_time(end)) / 1e3


def _event(device: torch.device) -> torch.cuda.Event:
    """A mark in the device's current stream. It may be another device than the thread's."""
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
    return event


def _connect(spec: WeightGroupSpec, rank: int) -> Any:
    """The backend's process group; the store and the group's constructor share ``spec.timeout_s``."""
    timeout = timedelta(seconds=spec.timeout_s)
    begun = time.monotonic()
    store = TCPStore(
        spec.master_address, spec.master_port, spec.world_size, is_master=rank == 0, timeout=timeout, multi_tenant=True
    )
    left = timedelta(seconds=max(1.0, spec.timeout_s - (time.monotonic() - begun)))
    store.set_timeout(left)
    device = {"gloo": "cpu", "nccl": "cuda"}[spec.backend]
    prefixed = PrefixStore(f"{device}/", PrefixStore(f"{spec.name}/", PrefixStore(spec.name, store)))
    if spec.backend == "gloo":
        return dist.ProcessGroupGloo(prefixed, rank, spec.world_size, left)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * timeout  # torch's watchdog only comes after our own deadline
    with _peers_may_die():
        return dist.ProcessGroupNCCL(prefixed, rank, spec.world_size, options)


@contextmanager
def _peers_may_die() -> Iterator[None]:
    """Groups that are made inside break when a peer dies or is late; torch's default ends the whole process."""
    name, clean_up_only = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"
    before = os.environ.get(name)
    os.environ[name] = clean_up_only
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _outcome(future: Future[T], spec: WeightGroupSpec, rank: int, what: str, timeout_s: float) -> T:
    """The future's result within ``timeout_s``; failures as errors that name group, rank and cause."""
    where = f"weight group {spec.name!r}, rank {rank} of {spec.world_size}: {what}"
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        raise WeightGroupTimeoutError(f"{where} within {spec.timeout_s:g} s") from error
    except RuntimeError as error:  # what torch.distributed raises for stores, sockets and its own deadlines
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        raise (WeightGroupTimeoutError if late else WeightGroupError)(f"{where} ({error})") from error
    finally:
        del future  # it holds the error, whose traceback holds this frame: a cycle would keep the group alive
