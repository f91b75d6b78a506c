"""Payloads as records: what a payload's record says of it, on its way to the disk and where it lies."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from slime_async.trajectory import TrajectoryKey
from slime_async.transport.buffers import Buffer
from slime_async.transport.journal.records import RECORD_HEAD_BYTES, Record, flat, pack_record
from slime_async.transport.journal.trail import Position

_KEY = struct.Struct("<qq")


class Location(NamedTuple):
    """Where a payload lies."""

    segment: int
    record: Record

    @property
    def size_bytes(self) -> int:
        """On disk"""
        return self.record.end - self.record.offset


class Appended(NamedTuple):
    """What a write put where; it counts once ``PayloadLog.keep`` is told."""

    before: Position
    locations: dict[TrajectoryKey, Location]


class Planned(NamedTuple):
    """A payload on its way to the disk: its record's meta is the key and the length of every frame."""

    offset: int
    key: TrajectoryKey
    meta: bytes
    body: list[memoryview]

    @classmethod
    def of(cls, offset: int, key: TrajectoryKey, frames: Sequence[Buffer]) -> Planned:
        body = [flat(frame) for frame in frames]
        lengths = struct.pack(f"<{len(body)}Q", *(part.nbytes for part in body))
        return cls(offset, key, _KEY.pack(*key) + lengths, body)

    @property
    def size_bytes(self) -> int:
        return RECORD_HEAD_BYTES + len(self.meta) + sum(part.nbytes for part in self.body)

    def pack(self, salt: int, body_crc: int | None) -> tuple[Record, list[memoryview]]:
        return pack_record(self.offset, self.meta, self.body, salt, body_crc)


def key_of(record: Record) -> TrajectoryKey:
    return TrajectoryKey(*_KEY.unpack_from(record.meta))


def lengths_of(record: Record) -> tuple[int, ...]:
    """Of the frames"""
    return tuple(length for (length,) in struct.iter_unpack("<Q", record.meta[_KEY.size :]))
