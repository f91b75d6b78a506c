"""One file of a journal: made whole or not at all, appended to, cut back when a write fails, deleted.

A segment is written under another name and renamed once its header (and first record) are on disk, so a file that has
a segment's name always has a valid beginning.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from slime_async.transport.journal.errors import JournalCorrupt
from slime_async.transport.journal.records import Kind, Scan, check_segment_header, pack_segment_header, scan

PARTIAL = ".partial"
_IOV_MAX = 1024
"""Buffers that one call takes (POSIX guarantees 16; Linux and macOS take 1024)"""


class Segment:
    """An open segment. System calls that fail raise ``OSError``; what was appended before stays as it is."""

    def __init__(self, path: Path, number: int, salt: int, descriptor: int, size: int) -> None:
        self.path = path
        self.number = number
        self.salt = salt
        self.size = size
        """Bytes that are valid; the file may be longer while an append runs"""
        self._descriptor = descriptor

    @classmethod
    def create(
        cls, directory: Path, kind: Kind, number: int, salt: int, first_record: Sequence[memoryview] = ()
    ) -> Self:
        """On disk, power loss included, when this returns: it happens once in many megabytes."""
        path = segment_path(directory, kind, number)
        partial = path.with_name(path.name + PARTIAL)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            header = memoryview(pack_segment_header(kind, number, salt))
            size = write_all(descriptor, [header, *first_record], 0)
            os.fdatasync(descriptor)
            partial.rename(path)
            sync_directory(directory)
        except OSError:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            raise
        return cls(path, number, salt, descriptor, size)

    @classmethod
    def open(cls, path: Path, kind: Kind) -> Self:
        """Raises ``JournalCorrupt`` and ``JournalVersionError`` for a bad header."""
        number = segment_number(path)
        descriptor = os.open(path, os.O_RDWR)
        try:
            salt = check_segment_header(os.pread(descriptor, 4096, 0), kind, number, path)
            return cls(path, number, salt, descriptor, os.fstat(descriptor).st_size)
        except BaseException:
            os.close(descriptor)
            raise

    def scan(self, verify_bodies: bool) -> Scan:
        """Its records; see ``records.scan``."""
        with mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ) as data:
            return scan(data, self.salt, verify_bodies)

    def append(self, buffers: Sequence[memoryview]) -> int:
        """The offset at which they begin. After an ``OSError``, ``cut(size)`` takes back what did get written."""
        offset = self.size
        self.size += write_all(self._descriptor, buffers, offset)
        return offset

    def overwrite(self, offset: int, buffer: memoryview) -> None:
        """Of what was just appended, before anybody is told of it."""
        write_all(self._descriptor, [buffer], offset)

    def cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> None:
        os.fdatasync(self._descriptor)

    def read(self, offset: int, lengths: Sequence[int]) -> list[memoryview]:
        """Consecutive pieces, each in memory of its own, so that arrays in them are aligned."""
        pieces = [memoryview(bytearray(length)) for length in lengths]
        pending = [piece for piece in pieces if piece.nbytes]
        while pending:
            count = os.preadv(self._descriptor, pending[:_IOV_MAX], offset)
            if count == 0:
                raise JournalCorrupt(self.path, "the file is shorter than when it was written", offset)
            offset += count
            pending = _rest(pending, count)
        return pieces

    def close(self) -> None:
        os.close(self._descriptor)

    def delete(self) -> None:
        self.close()
        self.path.unlink()


def write_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Everything, in as few calls as the system allows; returns the number of bytes."""
    pending, begun = list(buffers), offset
    while pending:
        count = os.pwritev(descriptor, pending[:_IOV_MAX], offset)
        offset += count
        pending = _rest(pending, count)
    return offset - begun


def _rest(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of them without their first ``count`` bytes."""
    done = 0
    while done < len(buffers) and count >= buffers[done].nbytes:
        count -= buffers[done].nbytes
        done += 1
    rest = buffers[done:]
    if count:
        rest[0] = rest[0][count:]
    return rest


def segment_path(directory: Path, kind: Kind, number: int) -> Path:
    return directory / f"{kind}-{number:08d}.journal"


def segment_number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def segment_paths(directory: Path, kind: Kind) -> list[Path]:
    """Those of one kind, by number."""
    name = re.compile(rf"{kind}-\d{{8,}}\.journal")
    return sorted((p for p in directory.iterdir() if name.fullmatch(p.name)), key=segment_number)


def sync_directory(directory: Path) -> None:
    """Names in it (made, renamed, deleted) survive power loss."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
