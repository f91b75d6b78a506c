"""The trajectories' bytes, apart from the events: kept while somebody needs them, then deleted a segment at a time.

A queue is used up nearly in the order in which it was filled, so segments die whole, by ``unlink``. A few long-lived
payloads may keep a segment alive. Only when the disk holds more than four bytes for each that is needed, and two
segments, are the payloads of the emptiest segment copied to the end of the log, so that it can be deleted: at most a
third of a byte is copied for every byte that is deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from slime_async.trajectory import TrajectoryKey
from slime_async.transport.buffers import Buffer
from slime_async.transport.journal.errors import JournalCorrupt
from slime_async.transport.journal.placement import Appended, Location, Planned, key_of, lengths_of
from slime_async.transport.journal.records import (
    SEGMENT_HEADER_BYTES,
    Record,
    Scan,
    checksum,
    new_salt,
)
from slime_async.transport.journal.segment import Segment, segment_paths
from slime_async.transport.journal.trail import Position

MOSTLY_DEAD = 0.25
"""The part of a full segment that may be alive when it is emptied; its inverse bounds disk use"""
PARALLEL_BYTES = 1 << 20
"""From here on a second thread for the checksums pays: they take as long as copying the bytes to the page cache"""


class PayloadLog:
    """Which payload lies where, in the order of writing; the last one of a key counts."""

    def __init__(self, directory: Path, segment_bytes: int) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segments: dict[int, Segment] = {}
        self._live_bytes: dict[int, int] = {}
        self._index: dict[TrajectoryKey, Location] = {}
        self._unsynced: set[int] = set()
        self._helper = ThreadPoolExecutor(1, "journal checksums")

    @classmethod
    def open(cls, directory: Path, segment_bytes: int, create: bool) -> tuple[PayloadLog, Scan | None]:
        """With the scan of the newest segment, whose torn tail is left for the caller to ``cut``; None for a new log.

        The newest segment is read in full, of the others the records' heads: their bodies are checked when read.
        Raises ``JournalCorrupt``, also where there is none and ``create`` is false.
        """
        opened = cls(directory, segment_bytes)
        paths = segment_paths(directory, "payloads")
        if not paths and not create:
            raise JournalCorrupt(directory, "there are events, but no segment of payloads")
        scanned: Scan | None = None
        with ExitStack() as undo:
            undo.callback(opened.close)
            for path in paths:
                scanned = opened._take_segment(path, newest=path is paths[-1])
            if not paths:
                opened._begin_segment(1)
            undo.pop_all()
        return opened, scanned

    # ----------------------------------------------------------------------------------------------- writing

    @property
    def end(self) -> Position:
        return Position(self._active.number, self._active.size)

    @property
    def untouched(self) -> bool:
        """Nothing was ever written"""
        return self.end == Position(1, SEGMENT_HEADER_BYTES)

    @property
    def path(self) -> Path:
        """Of the newest segment"""
        return self._active.path

    def append(self, payloads: Sequence[Mapping[TrajectoryKey, Sequence[Buffer]]]) -> tuple[Appended, list[Position]]:
        """Write them; also the log's end after each mapping. After an ``OSError``, ``cut`` takes back what was written.

        A segment is full when it has reached its size: one call's payloads lie in one segment.
        """
        if self._active.size >= self._segment_bytes and any(payloads):
            self._begin_segment(self._active.number + 1)
        before, ends, offset = self.end, [], self.end.offset
        planned: list[Planned] = []
        for mapping in payloads:
            for key, frames in mapping.items():
                planned.append(Planned.of(offset, key, frames))
                offset += planned[-1].size_bytes
            ends.append(Position(before.segment, offset))
        if planned:
            self._unsynced.add(before.segment)
        large = offset - before.offset >= PARALLEL_BYTES
        records = self._write_large(planned) if large else self._write(planned)
        locations = {one.key: Location(before.segment, record) for one, record in zip(planned, records, strict=True)}
        return Appended(before, locations), ends

    def _write(self, planned: Sequence[Planned], checksums: Sequence[int | None] | None = None) -> list[Record]:
        salt = self._active.salt
        packed = [one.pack(salt, crc) for one, crc in zip(planned, checksums or [None] * len(planned), strict=True)]
        self._active.append([buffer for _, buffers in packed for buffer in buffers])
        return [record for record, _ in packed]

    def _write_large(self, planned: Sequence[Planned]) -> list[Record]:
        """Write and sum up at the same time, in two threads; the heads are made right once the sums are known.

        Until then the records don't pass for valid, as they would not if half of them were written.
        """
        active, size = self._active, self._active.size
        summing = self._helper.submit(lambda: [checksum(one.body, active.salt) for one in planned])
        self._write(planned, [0] * len(planned))
        packed = [one.pack(active.salt, crc) for one, crc in zip(planned, summing.result(), strict=True)]
        try:
            for record, buffers in packed:
                active.overwrite(record.offset, buffers[0])
        except OSError:
            active.cut(size)
            raise
        return [record for record, _ in packed]

    def keep(self, locations: Mapping[TrajectoryKey, Location]) -> None:
        """From now on the payloads of these keys lie there."""
        self.release(locations)
        self._index.update(locations)
        for location in locations.values():
            self._live_bytes[location.segment] += location.size_bytes

    def cut(self, end: Position) -> None:
        """Take back what lies behind ``end``, in the newest segment."""
        assert end.segment == self._active.number, (end, self.end)
        self._active.cut(end.offset)

    def sync(self) -> None:
        for number in sorted(self._unsynced):
            self._segments[number].sync()
            self._unsynced.discard(number)

    # ----------------------------------------------------------------------------------------------- reading

    @property
    def keys(self) -> frozenset[TrajectoryKey]:
        return frozenset(self._index)

    @property
    def live_bytes(self) -> int:
        return sum(list(self._live_bytes.values()))

    @property
    def size_bytes(self) -> int:
        return sum(segment.size for segment in list(self._segments.values()))

    @property
    def segments(self) -> int:
        return len(self._segments)

    def read(self, key: TrajectoryKey) -> list[memoryview]:
        """Raises ``KeyError`` for a key without payload, ``JournalCorrupt`` for bytes that are not what was written."""
        location = self._index[key]
        segment, record = self._segments[location.segment], location.record
        frames = segment.read(record.body_offset, lengths_of(record))
        if checksum(frames, segment.salt) != record.body_crc:
            raise JournalCorrupt(segment.path, f"the payload of {key} has a wrong checksum", record.offset)
        return frames

    # ---------------------------------------------------------------------------------------------- deleting

    def release(self, keys: Iterable[TrajectoryKey]) -> None:
        """Unknown keys are passed over: a restart may release what was released before."""
        for key in keys:
            if (location := self._index.pop(key, None)) is not None:
                self._live_bytes[location.segment] -= location.size_bytes

    def dead_segments(self) -> list[int]:
        """Full segments of which nothing is needed."""
        return [number for number, live in self._live_bytes.items() if not live and number != self._active.number]

    def segment_to_empty(self) -> int | None:
        """The full segment with the smallest part alive, while the disk holds more than the bound at the top says.

        Then one is at most ``MOSTLY_DEAD`` alive: with all of them above, the bound would hold.
        """
        if self.size_bytes <= self.live_bytes / MOSTLY_DEAD + 2 * self._segment_bytes:
            return None
        full = [number for number, live in self._live_bytes.items() if live and number != self._active.number]
        alive = {number: self._live_bytes[number] / self._segments[number].size for number in full}
        return min((number for number in full if alive[number] <= MOSTLY_DEAD), key=alive.__getitem__, default=None)

    def payloads_of(self, number: int) -> list[TrajectoryKey]:
        """What is still needed of a segment, in its order."""
        keys = [key for key, location in self._index.items() if location.segment == number]
        return sorted(keys, key=lambda key: self._index[key].record.offset)

    def delete(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            assert not self._live_bytes[number], f"segment {number} holds {self._live_bytes[number]} bytes still needed"
            self._segments.pop(number).delete()
            del self._live_bytes[number]
            self._unsynced.discard(number)

    def close(self) -> None:
        self._helper.shutdown(wait=False)
        for segment in self._segments.values():
            segment.close()

    # ----------------------------------------------------------------------------------------------- private

    @property
    def _active(self) -> Segment:
        return self._segments[next(reversed(self._segments))]

    def _take_segment(self, path: Path, newest: bool) -> Scan:
        segment = Segment.open(path, "payloads")
        self._segments[segment.number], self._live_bytes[segment.number] = segment, 0
        scanned = segment.scan(verify_bodies=newest)
        if scanned.problem and (scanned.damaged or not newest):
            raise JournalCorrupt(path, scanned.problem, scanned.end)
        self.keep({key_of(record): Location(segment.number, record) for record in scanned.records})
        return scanned

    def _begin_segment(self, number: int) -> None:
        self._segments[number] = Segment.create(self._directory, "payloads", number, new_salt())
        self._live_bytes[number] = 0
