"""Messages to frames and back: one small msgpack header, then the raw bytes of each array.

::

    frame 0   msgpack [protocol version, call id, is a reply, [kind, {field: value}]], of shared replies [more call ids]
    frame 1…  the arrays' bytes, little-endian, in the order in which the header names them; several small ones in one

``call_id`` joins a call and its reply; notes have 0. Equal replies to up to ``SHARED_CALLS`` calls may be one message.
The first three entries keep their place in every version and an ``ErrorReply`` keeps its form, so that peers of
different versions can tell each other so. No pickle, no lists of numbers: small arrays are copied once, side by side,
where the socket would have copied them; large ones not at all, and out of the frames none is (received arrays are
read-only). See ``slime_async.transport.buffers``.

A trajectory stays in the form in which it came: inside a header it is a byte string with its own header, so a
``ReceivedTrajectory`` remembers its ``EncodedTrajectory`` and is sent on (or stored) without being coded again.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np

from slime_async.protocol import PROTOCOL_VERSION, ErrorReply, Message
from slime_async.trajectory import Trajectory
from slime_async.transport.buffers import DEFAULT_LIMITS, Buffer, Frames, Limits, check_sizes, frames_of, size_of
from slime_async.transport.coders import (
    INT_MAX,
    Coder,
    coder,
    fields_coder,
    register,
    union,
    wants,
)
from slime_async.transport.errors import BadMessage

__all__ = [
    "DEFAULT_LIMITS",
    "BadMessage",
    "Buffer",
    "EncodedTrajectory",
    "Envelope",
    "Limits",
    "ReceivedTrajectory",
    "decode",
    "decode_trajectory",
    "encode",
    "encode_trajectory",
]


class Envelope(NamedTuple):
    """A message as it came. ``call_id`` is 0 for a note; ``also`` are further calls that a reply answers."""

    message: Message
    call_id: int
    reply: bool
    also: tuple[int, ...] = ()


class EncodedTrajectory(NamedTuple):
    """A trajectory as bytes; accepted by ``encode`` wherever a message holds a trajectory."""

    header: bytes
    frames: tuple[Buffer, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(map(size_of, self.frames))


class ReceivedTrajectory(Trajectory):
    """A trajectory that came over the wire: its arrays are views of ``encoded``. ``replace`` gives one without it."""

    __slots__ = ("encoded",)
    encoded: EncodedTrajectory


# -------------------------------------------------------------------------------------------------- msgpack


def _numpy_scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {reprlib.repr(value)} has no form on the wire")


PACK_BYTES = 4096
"""What a header's buffer begins with; msgpack's own choice is 1 MiB for each"""


def _pack(raw: Any) -> bytes:
    try:
        packed: bytes = msgpack.Packer(default=_numpy_scalar, buf_size=PACK_BYTES).pack(raw)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadMessage(f"cannot be sent: {error}") from error
    return packed


def _unpack(header: Buffer, limits: Limits) -> Any:
    size = len(header)
    if size > limits.header_bytes:
        raise BadMessage(f"header has {size} bytes, the limit is {limits.header_bytes}")
    entries = min(size, limits.collection_length)  # no honest collection has more entries than its header has bytes
    try:
        return msgpack.unpackb(
            header,
            max_str_len=limits.string_bytes,
            max_bin_len=limits.header_bytes,
            max_array_len=entries,
            max_map_len=entries,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise BadMessage(f"header is no msgpack within the limits: {error!s:.200}") from None


# -------------------------------------------------------------------------------------------------- trajectories

_TRAJECTORY = fields_coder(Trajectory, ReceivedTrajectory)


def encode_trajectory(trajectory: Trajectory | EncodedTrajectory) -> EncodedTrajectory:
    """As it came, if it came over the wire. Raises ``BadMessage`` for wrong dtypes or dimensions."""
    if isinstance(trajectory, EncodedTrajectory):
        return trajectory
    encoded: EncodedTrajectory | None = getattr(trajectory, "encoded", None)
    if encoded is None:
        assert _TRAJECTORY.encode is not None
        frames: list[Buffer] = []
        header = _pack(_TRAJECTORY.encode(trajectory, frames))
        encoded = EncodedTrajectory(header, tuple(frames))
    return encoded


def decode_trajectory(encoded: EncodedTrajectory, limits: Limits = DEFAULT_LIMITS) -> ReceivedTrajectory:
    """Raises ``BadMessage``; the arrays are views of ``encoded``."""
    frames = Frames(encoded.frames, limits)
    trajectory = _decode_trajectory(encoded.header, frames)
    frames.end()
    return trajectory


def _decode_trajectory(raw: Any, frames: Frames) -> ReceivedTrajectory:
    if type(raw) is not bytes:
        raise wants("bytes of a trajectory", raw)
    first = len(frames.taken)
    trajectory: ReceivedTrajectory = _TRAJECTORY.decode(_unpack(raw, frames.limits), frames)
    encoded = EncodedTrajectory(raw, tuple(frames.taken[first:]))
    object.__setattr__(trajectory, "encoded", encoded)
    return trajectory


def _encode_trajectory(value: Any, frames: list[Buffer]) -> bytes:
    encoded = encode_trajectory(value)
    frames.extend(encoded.frames)
    return encoded.header


register(Trajectory, Coder(_encode_trajectory, _decode_trajectory))


# -------------------------------------------------------------------------------------------------- envelope

MESSAGE_KINDS: tuple[type[Message], ...] = tuple({kind.__name__: kind for kind in Message.__subclasses__()}.values())
"""By name, the last of each: ``dataclass(slots=True)`` makes every class anew, and the first may still be around."""

SHARED_CALLS = 8
"""That one reply answers at most"""

_MESSAGES = union(MESSAGE_KINDS)
_ERROR_REPLY = coder(ErrorReply)


def encode(
    message: Message,
    *,
    call_id: int = 0,
    reply: bool = False,
    also: Sequence[int] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> list[Buffer]:
    """Frames to send. Raises ``BadMessage`` for what the receiver would refuse: a wrong dtype, too large a size.

    A reply answers the calls ``also``, too: fewer than ``SHARED_CALLS`` of them.
    """
    assert _MESSAGES.encode is not None
    arrays: list[Buffer] = []
    body = _MESSAGES.encode(message, arrays)
    envelope = (PROTOCOL_VERSION, call_id, reply, body)
    frames: list[Buffer] = [_pack((*envelope, also) if also else envelope)]
    if arrays:
        frames += frames_of(arrays)
    try:
        check_sizes(frames, limits)
    except BadMessage as bad:
        raise bad.within(type(message).__name__) from None
    return frames


def decode(frames: Sequence[Buffer], limits: Limits = DEFAULT_LIMITS) -> Envelope:
    """Raises ``BadMessage`` for anything that ``encode`` would not have made, and for other protocol versions."""
    if not frames:
        raise BadMessage("a message has at least one frame, this one has none")
    check_sizes(frames, limits)
    call_id, reply, also, body = _open_envelope(_unpack(frames[0], limits))
    try:
        rest = Frames(frames[1:], limits)
        message = _MESSAGES.decode(body, rest)
        rest.end()
    except BadMessage as bad:
        bad.call_id, bad.reply, bad.also = call_id, reply, also
        raise
    return Envelope(message, call_id, reply, also)


def _open_envelope(raw: Any) -> tuple[int, bool, tuple[int, ...], Any]:
    if type(raw) is not list or len(raw) < 3:
        raise wants("[version, call id, reply, [kind, fields]]", raw)
    version, call_id, reply, *body = raw
    if type(version) is not int or type(call_id) is not int or not 0 <= call_id <= INT_MAX or type(reply) is not bool:
        raise wants("[version, call id, reply, [kind, fields]]", raw)
    also: Any = body.pop() if reply and len(body) == 2 and version == PROTOCOL_VERSION else []
    is_readable = version == PROTOCOL_VERSION or _is_error_reply(body)
    if len(body) != 1 or not is_readable or (also != [] and not _are_more_calls(also)):
        problem = f"peer speaks protocol version {version}, this side {PROTOCOL_VERSION}: install the same release"
        if version == PROTOCOL_VERSION:
            problem = f"envelope has {len(raw)} entries: not 4, nor 5 with the further call ids of a reply"
        bad = BadMessage(problem)
        bad.call_id, bad.reply = call_id, reply
        raise bad
    return call_id, reply, tuple(also), body[0]


def _is_error_reply(body: list[Any]) -> bool:
    return len(body) == 1 and type(body[0]) is list and body[0][:1] == [ErrorReply.__name__]


def _are_more_calls(also: Any) -> bool:
    return type(also) is list and len(also) < SHARED_CALLS and all(type(i) is int and 0 < i <= INT_MAX for i in also)
