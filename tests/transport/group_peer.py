"""An engine rank in a process of its own, driven over a pipe: one reply per command."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from slime_async.protocol import TensorSpec, WeightGroupSpec, WeightManifest
from slime_async.transport.weight_group import WeightGroup, WeightGroupError

REPLY_S = 20.0
"""The longest that a peer may take for anything; every deadline under test is shorter"""

_processes = multiprocessing.get_context("forkserver")  # torch is imported once, not by every peer
_processes.set_forkserver_preload([__name__])


def manifest_of(tensors: dict[str, Tensor]) -> WeightManifest:
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return WeightManifest(tuple(TensorSpec(name, dtypes[name], tuple(t.shape)) for name, t in tensors.items()))


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of every tensor's bytes, with its dtype and shape."""
    raw = {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()
    }
    return {n: f"{t.dtype} {tuple(t.shape)} {hashlib.sha256(raw[n]).hexdigest()}" for n, t in tensors.items()}


class Peer:
    """The parent's handle of one process."""

    def __init__(self) -> None:
        self._pipe, child = _processes.Pipe()
        self._process = _processes.Process(target=_serve, args=(child,), daemon=True)
        self._process.start()
        child.close()

    def ask(self, command: str, *arguments: Any) -> None:
        self._pipe.send((command, arguments))

    def reply(self) -> Any:
        """What the command returned, or the ``WeightGroupError`` that it raised."""
        assert self._pipe.poll(REPLY_S), f"no reply within {REPLY_S} s"
        return self._pipe.recv()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self._process.kill()
        self._process.join(REPLY_S)
        self._pipe.close()

    @classmethod
    @contextmanager
    def several(cls, count: int) -> Iterator[list[Peer]]:
        peers = [cls() for _ in range(count)]
        try:
            yield peers
        finally:
            for peer in peers:
                peer.kill()


class _Rank:
    """The child's side: one membership at a time."""

    def __init__(self) -> None:
        self._group: WeightGroup | None = None

    def join(self, spec: WeightGroupSpec, rank: int) -> None:
        self.close()
        self._group = WeightGroup.create(spec, rank)

    def receive(self, manifest: WeightManifest, buffer_bytes: int = 0) -> dict[str, str]:
        assert self._group is not None
        return digests(self._group.receive(manifest, buffer_bytes=buffer_bytes))

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


def _serve(pipe: Connection) -> None:
    rank = _Rank()
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(rank, command)(*arguments))
        except WeightGroupError as error:
            pipe.send(error)
