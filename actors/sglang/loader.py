"""Runs inside SGLang's schedulers: takes weights in large buffers, and loads each while the next one comes.

::

    actor                         scheduler, between two steps
    /update_weights_from_tensor   load(model, …)
        order, as JSON  ────────►   broadcast 0 ████████
                                    broadcast 1         ████████   ← two buffers are held, never the whole model
                                    load 0              ███
                                    broadcast 2                 ████████ …

``/update_weights_from_distributed`` does less well: it holds all tensors of a call before it loads the first, and
broadcasts each by itself. SGLang calls a loader of others (``--custom-weight-loader``) with the model and with tensors,
of which there are none here: what is to be done stands in the place of a tensor's name. The groups are those that the
server joined by ``/init_weights_update_group``.

An exception would end the server, and a loader's result nobody hears. So what went wrong is left in a file that the
order names, one for each rank; the server then has old, new and half of the weights, and lives.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime_async.protocol import TensorSpec, WeightManifest
from slime_async.transport.shared_tensors import Reduction
from slime_async.transport.weight_layout import BufferLayout, buffers_of

log = logging.getLogger(__name__)

LOADER = f"{__name__}.load"
"""As SGLang finds it"""
AHEAD = 1
"""Broadcasts that are queued beyond the buffer that is loaded next"""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Which weights come over which groups."""

    groups: tuple[str, ...]
    parts: tuple[WeightManifest, ...]
    """Of each group"""
    buffer_bytes: int
    failures: str
    """Where a rank says what went wrong: this path, a dot, its process's id"""

    def payload(self) -> str:
        """One entry of ``serialized_named_tensors``: a list of one name and an empty tensor, as torch pickles it."""
        named = [(json.dumps(asdict(self)), Reduction(torch.ByteTensor, []))]
        return base64.b64encode(pickle.dumps(named)).decode()

    @classmethod
    def read(cls, text: str) -> LoadOrder:
        raw = json.loads(text)
        parts = (
            WeightManifest(tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in part["tensors"]))
            for part in raw["parts"]
        )
        return cls(tuple(raw["groups"]), tuple(parts), raw["buffer_bytes"], raw["failures"])

    def take_failures(self) -> list[str]:
        """What ranks have left there."""
        path = Path(self.failures)
        found = []
        for left in sorted(path.parent.glob(f"{path.name}.*")):
            found.append(left.read_text())
            left.unlink()
        return found


def load(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """What SGLang calls, on every rank of a server."""
    order = LoadOrder.read(named_tensors[0][0])
    try:
        receive(model, order)
    except Exception as error:
        log.exception("weights could not be received")
        Path(f"{order.failures}.{os.getpid()}").write_text(f"{type(error).__name__}: {error}")


def receive(model: Any, order: LoadOrder) -> None:
    """Returns when everything is in the model.

    It is handed to the model as one iterator: each call of ``load_weights`` first looks at all parameters.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        model.load_weights(_arriving(order, device))
        return
    # Some models load on threads, whose stream is the default one. The scheduler's is another: its work comes first.
    stream = torch.cuda.default_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        model.load_weights(_arriving(order, device))
    stream.synchronize()


def _arriving(order: LoadOrder, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Group after group, buffer after buffer; whoever takes the first tensor of one has used those before it."""
    for name, part in zip(order.groups, order.parts, strict=True):
        group = _group(name)
        coming: deque[tuple[BufferLayout, Tensor, Any]] = deque()
        for layout in buffers_of(part, order.buffer_bytes):
            # its memory may have been an earlier buffer's: the broadcast waits for what this stream does with that
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
            coming.append((layout, buffer, dist.broadcast(buffer, src=0, group=group, async_op=True)))
            del buffer
            if len(coming) > AHEAD:
                yield from _arrived(*coming.popleft())
        while coming:
            yield from _arrived(*coming.popleft())


def _arrived(layout: BufferLayout, buffer: Tensor, broadcast: Any) -> Iterator[tuple[str, Tensor]]:
    broadcast.wait()  # on CUDA it is the stream that waits
    return layout.views(buffer)


def _group(name: str) -> Any:
    """The server keeps its groups to itself, but torch knows them by name."""
    names = dist.distributed_c10d._world.pg_names
    found = [group for group, known in names.items() if known == name]
    if not found:
        raise RuntimeError(f"this server is in no weight group {name!r}, only in {sorted(names.values())}")
    return found[0]
