"""What goes through the pipes between an actor and its workers: a length, then plain data as msgpack. No pickle: what a
worker was made to run (a verifier that executes answers, say) must not reach the actor through its replies."""

from __future__ import annotations

import struct
from typing import Any

import msgpack

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 256 << 20
"""A larger argument or result is refused: it would hold up every episode of the actor while it is read"""


def pack(value: Any) -> bytes:
    """Length and bytes. Raises ``TypeError`` for what is no plain data, ``ValueError`` for too much of it."""
    try:
        body: bytes = msgpack.packb(value, default=_plain)
    except OverflowError as error:
        raise ValueError(f"numbers beyond 64 bits do not go through a pipe: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"{len(body)} bytes are more than the {MAX_FRAME_BYTES} that one call may carry")
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> Any:
    return msgpack.unpackb(body, strict_map_key=False)


def _plain(value: Any) -> Any:
    """numpy's scalars and arrays as numbers and lists; sets sorted, where that can be done."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(
        f"a {type(value).__name__} does not go through a pipe: arguments and results of functions in worker processes "
        "are plain data (numbers, strings, bytes, lists, dictionaries, None)"
    )
