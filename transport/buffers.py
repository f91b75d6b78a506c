"""Arrays in frames: small ones share a frame, large ones have their own; sizes are checked against limits.

::

    frame 1     ids ····|mask···|log-probs ····      each array begins at a multiple of 8 bytes of its frame;
    frame 2     routed experts ·················     what pads it there is nobody's to read

A frame costs system calls and a hand-over between threads at both ends, about as much as copying 64 KB: so what would
be copied into the socket anyway is copied here instead, side by side. How arrays are spread over frames is the
sender's choice; the receiver takes one after the other, the next frame once one is used up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slime_async.transport.errors import BadMessage

Buffer = bytes | bytearray | memoryview

ALIGNMENT = 8
"""Bytes; the largest item of any dtype"""
BORROW_FROM_BYTES = 512 << 10
"""Arrays from this size on are lent to the socket as they are: cheaper than copying, dearer than it for smaller ones,
because ZeroMQ calls back when it is done with what it borrowed"""
SHARED_FRAME_BYTES = 1 << 20
"""A shared frame takes no further array beyond this size"""

_PADDING = [bytes(n) for n in range(ALIGNMENT)]
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes beyond which a message is refused: by its sender with ``BadMessage``, by its receiver unread."""

    header_bytes: int = 16 << 20
    """The msgpack part; a manifest of 50,000 tensors takes 5 MB"""
    frame_bytes: int = 64 << 20
    """One array, or several small ones; sockets close a connection that announces a larger frame"""
    frames: int = 1 << 18
    """Raw frames of one message; a batch has one or more per trajectory with large arrays"""
    total_bytes: int = 16 << 30
    """All of one message"""
    collection_length: int = 1 << 16
    """Entries of one tuple or dict"""
    string_bytes: int = 1 << 20
    dimensions: int = 4
    """Of an array"""


DEFAULT_LIMITS = Limits()


def size_of(buffer: Buffer) -> int:
    return buffer.nbytes if type(buffer) is memoryview else len(buffer)


def frames_of(arrays: Iterable[Buffer]) -> list[Buffer]:
    """The frames that hold ``arrays``, in order. Large arrays are not copied."""
    frames: list[Buffer] = []
    shared: list[Buffer] = []
    used = 0
    for array in arrays:
        size = size_of(array)
        padding = -used % ALIGNMENT
        if shared and (size >= BORROW_FROM_BYTES or used + padding + size > SHARED_FRAME_BYTES):
            frames.append(b"".join(shared) if len(shared) > 1 else shared[0])
            shared, used, padding = [], 0, 0
        if size >= BORROW_FROM_BYTES:
            frames.append(array)
        elif size:
            if padding:
                shared.append(_PADDING[padding])
            shared.append(array)
            used += padding + size
    if shared:
        frames.append(b"".join(shared) if len(shared) > 1 else shared[0])
    return frames


class Frames:
    """Takes arrays out of the raw frames of one message, read-only: they may be sent on."""

    __slots__ = ("_frame", "_position", "_rest", "limits", "taken")

    def __init__(self, frames: Sequence[Buffer], limits: Limits) -> None:
        self.limits = limits
        self.taken: list[memoryview] = []
        """All that was taken, in order, but for what is empty"""
        self._rest = iter(frames)
        self._frame = _NOTHING
        self._position = 0

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes. Raises ``BadMessage`` when they are not there."""
        if not size:
            return _NOTHING
        if self._position == self._frame.nbytes:
            self._begin_frame()
        start = self._position + -self._position % ALIGNMENT
        self._position = end = start + size
        if end > self._frame.nbytes:
            raise BadMessage(f"wants {size} bytes where its frame has {max(0, self._frame.nbytes - start)}")
        view = self._frame[start:end]
        self.taken.append(view)
        return view

    def _begin_frame(self) -> None:
        frame = next(self._rest, None)
        if frame is None:
            raise BadMessage("names more arrays than its raw frames hold")
        self._frame = memoryview(frame).toreadonly().cast("B")
        self._position = 0

    def end(self) -> None:
        """Raises ``BadMessage`` unless everything was taken."""
        left, rest = self._frame.nbytes - self._position, list(self._rest)
        if left or rest:
            raise BadMessage(f"has {left} bytes and {len(rest)} raw frames more than its header names")


def check_sizes(frames: Sequence[Buffer], limits: Limits) -> None:
    """Raises ``BadMessage`` for a message, the header first, that is beyond ``limits``."""
    if len(frames) - 1 > limits.frames:
        raise BadMessage(f"has {len(frames) - 1} raw frames, the limit is {limits.frames}")
    total, most = 0, limits.header_bytes
    for i, frame in enumerate(frames):
        size = frame.nbytes if type(frame) is memoryview else len(frame)
        total += size
        if size > most:
            limit = f"{most} for a raw frame" if i else f"{most} for a header"
            raise BadMessage(f"frame {i} has {size} bytes, the limit is {limit}")
        most = limits.frame_bytes
    if total > limits.total_bytes:
        raise BadMessage(f"has {total} bytes, the limit is {limits.total_bytes}")
