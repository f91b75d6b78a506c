"""Every event of a run, in order and for ever: what a restarted queue is the fold of, and what the audit reads.

A segment begins with a snapshot of the queue (the first: with the queue's first event), so a restart reads the newest
segment only. The older ones are compressed, never read by the hub and never deleted: some 40 bytes per trajectory.
"""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack

from slime_async.queue import Event, Snapshot, from_plain, to_plain
from slime_async.transport.journal.errors import JournalCorrupt
from slime_async.transport.journal.records import (
    SEGMENT_HEADER_BYTES,
    Record,
    Scan,
    check_segment_header,
    new_salt,
    pack_record,
    scan,
)
from slime_async.transport.journal.segment import Segment, segment_number, segment_path, segment_paths

log = logging.getLogger(__name__)
_META = struct.Struct("<QQ?")
_COMPRESSED = b"zlib"
"""The meta of the one record that a compressed segment has; its body is the segment as it was"""
_COMPRESSION_LEVEL = 1  # a third of the size in 10 ms per MB; higher ones take three times as long for 6% less


class Position(NamedTuple):
    """A place in a log; later ones are greater."""

    segment: int
    offset: int


class Needs(NamedTuple):
    """How far the payloads were written before the events of a record."""

    payloads: Position
    synced: bool
    """They were safe from power loss by then"""


class TrailEntry(NamedTuple):
    """One append, read again."""

    events: tuple[Event, ...]
    needs: Needs
    offset: int


def pack_entry(offset: int, events: Sequence[Event], needs: Needs, salt: int) -> tuple[Record, list[memoryview]]:
    body = msgpack.packb([to_plain(event) for event in events])
    return pack_record(offset, _META.pack(*needs.payloads, needs.synced), [memoryview(body)], salt)


def unpack_entry(data: bytes, record: Record, path: Path) -> TrailEntry:
    """Raises ``JournalCorrupt`` for events of another release."""
    segment, offset, synced = _META.unpack(record.meta)
    try:
        plain = msgpack.unpackb(data[record.body_offset : record.end])
        events = tuple(from_plain(event) for event in plain)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise JournalCorrupt(path, f"events that this release cannot read ({error})", record.offset) from error
    return TrailEntry(events, Needs(Position(segment, offset), synced), record.offset)


class Trail:
    """The log of events, open for appending."""

    def __init__(self, directory: Path, segment: Segment, snapshot_bytes: int) -> None:
        self._directory = directory
        self._segment = segment
        self._older_bytes = sum(p.stat().st_size for p in segment_paths(directory, "events")) - segment.size
        self.snapshot_bytes = snapshot_bytes
        """Size of the present segment's beginning"""

    @classmethod
    def create(cls, directory: Path) -> Trail:
        segment = Segment.create(directory, "events", 1, new_salt())
        return cls(directory, segment, segment.size)

    @classmethod
    def open(cls, directory: Path) -> tuple[Trail, list[TrailEntry], Scan]:
        """With the entries since the newest snapshot; a torn tail is left for the caller to ``cut``."""
        path = check_numbers(directory)[-1]
        entries, scanned = read_segment(path, path.read_bytes(), newest=True)
        snapshot_bytes = scanned.records[0].end if scanned.records else scanned.end
        return cls(directory, Segment.open(path, "events"), snapshot_bytes), entries, scanned

    @property
    def end(self) -> Position:
        return Position(self._segment.number, self._segment.size)

    @property
    def size_bytes(self) -> int:
        return self._older_bytes + self._segment.size

    @property
    def path(self) -> Path:
        """Of the newest segment"""
        return self._segment.path

    def append(self, batch: Iterable[tuple[Sequence[Event], Needs]]) -> list[Position]:
        """The position after each. After an ``OSError``, ``cut`` takes back what did get written."""
        buffers: list[memoryview] = []
        ends: list[Position] = []
        offset = self._segment.size
        for events, needs in batch:
            if events:
                record, packed = pack_entry(offset, events, needs, self._segment.salt)
                offset = record.end
                buffers += packed
            ends.append(Position(self._segment.number, offset))
        if buffers:
            self._segment.append(buffers)
        return ends

    def cut(self, end: Position) -> None:
        assert end.segment == self._segment.number, (end, self.end)
        self._segment.cut(end.offset)

    def sync(self) -> None:
        self._segment.sync()

    def rotate(self, snapshot: Snapshot, needs: Needs) -> None:
        """Begin a new segment. The old one is on disk before the new one has a name, and is compressed afterwards."""
        old, salt = self._segment, new_salt()
        old.sync()
        _, packed = pack_entry(SEGMENT_HEADER_BYTES, [snapshot], needs, salt)
        self._segment = Segment.create(self._directory, "events", old.number + 1, salt, packed)
        self.snapshot_bytes = self._segment.size
        old.close()
        self._older_bytes += _compress(self._directory, old)

    def close(self) -> None:
        self._segment.close()


def _compress(directory: Path, old: Segment) -> int:
    """Put a compressed segment in the old one's place, in one step; its size."""
    body = memoryview(zlib.compress(old.path.read_bytes(), _COMPRESSION_LEVEL))
    _, packed = pack_record(SEGMENT_HEADER_BYTES, _COMPRESSED, [body], old.salt)
    segment = Segment.create(directory, "events", old.number, old.salt, packed)
    segment.close()
    return segment.size


def check_numbers(directory: Path) -> list[Path]:
    """The segments' paths. Raises ``JournalCorrupt`` when one is missing."""
    paths = segment_paths(directory, "events")
    numbers = [segment_number(path) for path in paths]
    wanted = list(range(1, max(numbers, default=1) + 1))
    for number in wanted:
        if number not in numbers:
            raise JournalCorrupt(segment_path(directory, "events", number), "this segment is missing")
    return paths


def read_segment(path: Path, data: bytes, newest: bool) -> tuple[list[TrailEntry], Scan]:
    """Raises ``JournalCorrupt`` for damage: anything but a torn tail of the newest segment."""
    salt = check_segment_header(data, "events", segment_number(path), path)
    scanned = scan(data, salt, verify_bodies=True)
    if scanned.problem and (scanned.damaged or not newest):
        raise JournalCorrupt(path, scanned.problem, scanned.end)
    if scanned.records and scanned.records[0].meta == _COMPRESSED:
        record = scanned.records[0]
        return read_segment(path, zlib.decompress(data[record.body_offset : record.end]), newest=False)
    return [unpack_entry(data, record, path) for record in scanned.records], scanned


def read_trail(directory: Path) -> Iterator[Event]:
    """Every event of a run from its first on, every checksum verified. The run may be going on: nothing is locked or
    changed, and a write in progress is left out. Raises ``JournalCorrupt``, and ``JournalVersionError``."""
    paths = check_numbers(directory)
    if not paths:
        raise JournalCorrupt(segment_path(directory, "events", 1), "this segment is missing")
    for path in paths:
        entries, _ = read_segment(path, path.read_bytes(), newest=path is paths[-1])
        for entry in entries:
            yield from entry.events
