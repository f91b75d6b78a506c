"""How a manifest's tensors are told apart: in parts, in shares, side by side in large buffers. The same on both sides.

::

    buffer 0    q ·······|k ···|norm|·|     each tensor begins at a multiple of ALIGNMENT_BYTES;
    buffer 1    embedding ············      one that is larger than a buffer has a buffer for itself

A collective costs about 18 µs on NVLink however little it carries, which is more than most tensors take to go over:
one broadcast per buffer costs that once for many of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from slime_async.protocol import TensorSpec, WeightManifest

ALIGNMENT_BYTES = 256
"""Of every tensor in a buffer, as CUDA's allocator gives it"""


@dataclass(frozen=True, slots=True)
class BufferLayout:
    """What lies where in one buffer."""

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    """In bytes"""
    nbytes: int

    def views(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors by name, in ``buffer``: uint8, ``(nbytes,)``, contiguous."""
        for spec, start in zip(self.tensors, self.offsets, strict=True):
            flat = buffer[start : start + tensor_bytes(spec)]
            yield spec.name, flat.view(torch_dtype(spec.dtype)).view(spec.shape)


def buffers_of(manifest: WeightManifest, buffer_bytes: int) -> list[BufferLayout]:
    """The tensors in order, in buffers of ``buffer_bytes`` and what aligns them."""
    layouts = []
    for part in consecutive_parts(manifest, buffer_bytes):
        offsets, end = [], 0
        for spec in part:
            offsets.append(end)
            end += -(-tensor_bytes(spec) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        layouts.append(BufferLayout(tuple(part), tuple(offsets), end))
    return layouts


def consecutive_parts(manifest: WeightManifest, limit_bytes: int) -> list[list[TensorSpec]]:
    """The tensors in order, each part as large as the limit allows; one that is larger has a part for itself."""
    parts: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in manifest.tensors:
        if parts[-1] and size + tensor_bytes(spec) > limit_bytes:
            parts.append([])
            size = 0
        parts[-1].append(spec)
        size += tensor_bytes(spec)
    return parts


def shares_of(manifest: WeightManifest, shares: Sequence[int], groups: int) -> list[WeightManifest]:
    """What each of an engine's groups brings, of ``manifest``'s tensors in their order; one group brings all.

    Raises ``ValueError`` for shares that are not the groups', or not of that many tensors.
    """
    counts = list(shares) or [len(manifest.tensors)]
    if len(counts) != groups or sum(counts) != len(manifest.tensors):
        raise ValueError(
            f"shares of {counts} tensors do not divide {len(manifest.tensors)} tensors over {groups} weight groups: "
            "join as many groups as there are sources, and name each one's share"
        )
    rest = iter(manifest.tensors)
    return [WeightManifest(tuple(islice(rest, count))) for count in counts]


def torch_dtype(name: str) -> torch.dtype:
    """``bfloat16`` → ``torch.bfloat16``. Raises ``ValueError`` for a name that torch does not know."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no torch dtype: manifests say bfloat16, float32, …")
    return dtype


def tensor_bytes(spec: TensorSpec) -> int:
    """Of the whole tensor's contents."""
    return math.prod(spec.shape) * torch_dtype(spec.dtype).itemsize
