"""The bytes of a journal segment, without any I/O.

::

    segment   magic · version · kind · number · salt · CRC         28 bytes
    record    magic · meta size · body size · body CRC · head CRC  24 bytes, little-endian
              meta                                                 a few numbers: what the body is
              body

The head's CRC covers head and meta, so sizes can be believed before the body is read. Both CRCs begin with the
segment's random salt: bytes of another segment, even of a journal inside a payload, never pass for records.

One append is one record, so it is there as a whole or not at all. A bad record with nothing valid behind it is the
tail of a write that was cut off; a bad record with valid ones behind it is damage.
"""

from __future__ import annotations

import mmap
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from slime_async.transport.buffers import Buffer
from slime_async.transport.journal.errors import JournalCorrupt, JournalVersionError

FORMAT_VERSION = 2
"""Of the bytes here and of the events in them; a test fails when events change and this does not"""

Kind = Literal["events", "payloads"]
_KINDS: tuple[Kind, ...] = ("events", "payloads")
_SEGMENT = struct.Struct("<8sHHQII")
_SEGMENT_MAGIC = b"slimejnl"
_RECORD = struct.Struct("<4sIQII")
_RECORD_MAGIC = b"\xf5rec"  # no byte sequence of UTF-8 text begins so
_CRC = struct.Struct("<I")

SEGMENT_HEADER_BYTES = _SEGMENT.size
RECORD_HEAD_BYTES = _RECORD.size

Data = bytes | mmap.mmap


class Record(NamedTuple):
    """Where one record lies in its segment, and its small part."""

    offset: int
    meta: bytes
    body_offset: int
    body_bytes: int
    body_crc: int

    @property
    def end(self) -> int:
        return self.body_offset + self.body_bytes


@dataclass(frozen=True, slots=True)
class Scan:
    """``end`` is where the valid records end; ``problem`` says what is there if the segment goes on."""

    records: tuple[Record, ...]
    end: int
    problem: str = ""
    damaged: bool = False
    """Valid records follow the problem: no cut-off write leaves that behind"""


def new_salt() -> int:
    return secrets.randbits(32)


def flat(buffer: Buffer) -> memoryview:
    """Its bytes, one-dimensional, not copied, whatever its format."""
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1:
        return view
    return np.frombuffer(view, np.uint8).data if view.nbytes else memoryview(b"")


def checksum(buffers: Sequence[Buffer], salt: int) -> int:
    crc = salt
    for buffer in buffers:
        crc = zlib.crc32(buffer, crc)
    return crc


def pack_segment_header(kind: Kind, number: int, salt: int) -> bytes:
    header = _SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, _KINDS.index(kind), number, salt, 0)[: -_CRC.size]
    return header + _CRC.pack(zlib.crc32(header))


def check_segment_header(data: Data, kind: Kind, number: int, path: Path) -> int:
    """The salt. Raises ``JournalVersionError`` and ``JournalCorrupt``."""
    header = data[:SEGMENT_HEADER_BYTES]
    if len(header) < SEGMENT_HEADER_BYTES or not header.startswith(_SEGMENT_MAGIC):
        raise JournalCorrupt(path, "this is no journal segment", 0)
    _, version, written_kind, written_number, salt, crc = _SEGMENT.unpack(header)
    if version != FORMAT_VERSION:
        raise JournalVersionError(
            path,
            f"the journal has format {version}, this release reads format {FORMAT_VERSION}",
            "carry the run on with the release of slime_async that began it",
        )
    if crc != zlib.crc32(header[: -_CRC.size]) or (written_kind, written_number) != (_KINDS.index(kind), number):
        raise JournalCorrupt(path, f"the header is not that of {kind} segment {number}", 0)
    return int(salt)


def pack_record(
    offset: int, meta: bytes, body: Sequence[memoryview], salt: int, body_crc: int | None = None
) -> tuple[Record, list[memoryview]]:
    """A record for ``offset``, and the buffers to write there one after the other; the body's are the ones given.

    ``body_crc``: its checksum, where it is known already.
    """
    size, crc = sum(part.nbytes for part in body), checksum(body, salt) if body_crc is None else body_crc
    head = _RECORD.pack(_RECORD_MAGIC, len(meta), size, crc, 0)[: -_CRC.size]
    begin = b"".join((head, _CRC.pack(checksum((head, meta), salt)), meta))
    record = Record(offset, meta, offset + len(begin), size, crc)
    return record, [memoryview(begin), *(part for part in body if part.nbytes)]


def parse_record(data: Data, offset: int, salt: int, verify_body: bool) -> Record | str:
    """The record that begins at ``offset``, or what is wrong with it."""
    left = len(data) - offset
    if left < RECORD_HEAD_BYTES:
        return f"{left} bytes are too few for a record"
    head = data[offset : offset + RECORD_HEAD_BYTES]
    magic, meta_bytes, body_bytes, body_crc, head_crc = _RECORD.unpack(head)
    if magic != _RECORD_MAGIC:
        return "no record begins here"
    body_offset = offset + RECORD_HEAD_BYTES + meta_bytes
    if body_offset > len(data):
        return "a record's head is cut off"
    meta = data[offset + RECORD_HEAD_BYTES : body_offset]
    if checksum((head[: -_CRC.size], meta), salt) != head_crc:
        return "a record's head has a wrong checksum"
    if body_offset + body_bytes > len(data):
        return f"a record's body is cut off after {len(data) - body_offset} of {body_bytes} bytes"
    record = Record(offset, bytes(meta), body_offset, body_bytes, body_crc)
    if verify_body and not body_is_valid(data, record, salt):
        return "a record's body has a wrong checksum"
    return record


def body_is_valid(data: Data, record: Record, salt: int) -> bool:
    with memoryview(data) as whole, whole[record.body_offset : record.end] as body:
        return zlib.crc32(body, salt) == record.body_crc


def scan(data: Data, salt: int, verify_bodies: bool) -> Scan:
    """Every record from the segment's header on, up to the first that is not valid."""
    records: list[Record] = []
    offset = SEGMENT_HEADER_BYTES
    while offset < len(data):
        found = parse_record(data, offset, salt, verify_bodies)
        if isinstance(found, str):
            return Scan(tuple(records), offset, found, _any_record_after(data, offset, salt))
        records.append(found)
        offset = found.end
    return Scan(tuple(records), offset)


def _any_record_after(data: Data, offset: int, salt: int) -> bool:
    """A byte-wise search: the bad record's own sizes cannot be believed."""
    while (offset := data.find(_RECORD_MAGIC, offset + 1)) >= 0:
        if not isinstance(parse_record(data, offset, salt, verify_body=True), str):
            return True
    return False
