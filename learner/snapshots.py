"""Weights on their way out: converted to Hugging Face tensors in buffers of their own, while they are being sent.

::

    training loop          publisher                 buffers A   buffers B
    begin(v) ─ publish ──► takes v as current            v          v − 1
    fill(v): queues 0, 1 ► pauses the engines            …
    next step …            broadcasts buffer 0 while the device converts 1
                           broadcasts buffer 1, resumes

There are two sets of buffers, used in turn and never given back: one holds the current weights, which a late engine may
still ask for, the other takes the next. A set is free when the publisher has taken the snapshot after its own, which
``Publisher.publish`` waits for; so publish first, then fill.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slime_async.protocol import TensorSpec, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.weight_layout import buffers_of

Place = Callable[[TensorSpec], Tensor]
"""Where a tensor is to be written"""
Export = Callable[[Place], Iterator[tuple[str, Tensor]]]
"""Writes every tensor of the manifest to its place, in order"""


class FillError(Exception):
    """A snapshot did not get its contents."""


class Filling:
    """How far a snapshot is filled. One thread fills, another follows."""

    def __init__(self, total: int, filled: int = 0) -> None:
        self._changed = threading.Condition()
        self._total = total
        self._filled = filled
        self._events: list[tuple[int, torch.cuda.Event | None]] = []
        self._problem = ""

    def advance(self, filled: int, event: torch.cuda.Event | None) -> None:
        """The first ``filled`` tensors are complete, on CUDA once ``event`` has happened."""
        with self._changed:
            self._filled = filled
            self._events.append((filled, event))
            self._changed.notify_all()

    def fail(self, problem: str) -> None:
        with self._changed:
            self._problem = problem
            self._changed.notify_all()

    def wait(self, count: int, timeout_s: float) -> torch.cuda.Event | None:
        """Until ``count`` tensors are filled. Raises ``FillError`` when that fails or takes longer."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._filled >= count or self._problem, timeout_s):
                raise FillError(f"only {self._filled} of {self._total} tensors were converted within {timeout_s:g} s")
            if self._filled < count:
                raise FillError(f"converting the weights failed: {self._problem}")
            return next((event for filled, event in self._events if filled >= count), None)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Whole Hugging Face tensors that nobody writes to any more once they are filled, in sending order."""

    weights: WeightId
    manifest: WeightManifest
    tensors: tuple[Tensor, ...]
    filling: Filling | None = None
    """None: complete from the beginning"""
    buffers: tuple[tuple[int, Tensor], ...] = ()
    """The tensors again, as the bytes that they are part of; and how many lie in each buffer and those before it"""

    def arriving(self, timeout_s: float, *, whole_buffers: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as they are filled; on CUDA the current stream waits, not the caller.

        ``whole_buffers``: the buffers, as ``buffers_of`` lays them out, under the names of their last tensors.
        """
        awaited = None
        for count, tensor in self.buffers if whole_buffers else enumerate(self.tensors, 1):
            event = None if self.filling is None else self.filling.wait(count, timeout_s)
            if event is not None and event is not awaited:  # tensors of one buffer share theirs
                torch.cuda.current_stream(tensor.device).wait_event(event)
                awaited = event
            yield self.manifest.tensors[count - 1].name, tensor

    def wait_queued(self, timeout_s: float) -> None:
        """Until all conversions are done, on CUDA at least queued: from then on none wants the interpreter."""
        if self.filling is not None:
            self.filling.wait(len(self.tensors), timeout_s)

    def wait_filled(self, timeout_s: float) -> None:
        """Until all is there, on CUDA too."""
        if self.filling is not None and (event := self.filling.wait(len(self.tensors), timeout_s)) is not None:
            event.synchronize()


@dataclass(slots=True)
class WeightBuffers:
    """One set of large flat buffers, and in them a view for each tensor of the manifest."""

    tensors: tuple[Tensor, ...]
    buffers: tuple[tuple[int, Tensor], ...]
    """And for each, how many tensors it and those before it hold"""

    @classmethod
    def allocate(cls, manifest: WeightManifest, device: torch.device, buffer_bytes: int) -> WeightBuffers:
        tensors: list[Tensor] = []
        buffers: list[tuple[int, Tensor]] = []
        for layout in buffers_of(manifest, buffer_bytes):
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
            tensors += (tensor for _, tensor in layout.views(buffer))
            buffers.append((len(tensors), buffer))
        return cls(tuple(tensors), tuple(buffers))


@dataclass(slots=True)
class Snapshots:
    """Makes the source rank's snapshots, in two sets of buffers."""

    manifest: WeightManifest
    device: torch.device
    buffer_bytes: int
    _sets: list[WeightBuffers] = field(default_factory=list)
    _taken: int = 0

    def begin(self, weights: WeightId) -> Snapshot:
        """A snapshot to be published at once, and filled after that."""
        if len(self._sets) < 2:
            self._sets.append(WeightBuffers.allocate(self.manifest, self.device, self.buffer_bytes))
        buffers = self._sets[self._taken % 2]
        self._taken += 1
        return Snapshot(weights, self.manifest, buffers.tensors, Filling(len(buffers.tensors)), buffers.buffers)

    def fill(self, snapshot: Snapshot, export: Export) -> None:
        """Write the weights as they are now; on CUDA this only queues the work."""
        assert snapshot.filling is not None
        ends = {count for count, _ in snapshot.buffers}
        places = dict(zip((spec.name for spec in self.manifest.tensors), snapshot.tensors, strict=True))
        try:
            for count, _ in enumerate(export(lambda spec: places[spec.name]), 1):
                if count in ends:
                    snapshot.filling.advance(count, _mark(self.device))
        except BaseException as error:
            snapshot.filling.fail(str(error))
            raise


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
