"""Where the journal's benchmark puts trajectories: memory, the bare disk, the journal, SQLite."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgpack

from slime_async.queue import to_plain
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.journal import Entry, Journal


class Store(Protocol):
    def append(self, entries: Sequence[Entry]) -> None: ...

    def release(self, keys: Sequence[TrajectoryKey]) -> None: ...

    def read(self, key: TrajectoryKey) -> int:
        """Its bytes; 0 where there is nothing to measure"""

    def sync(self) -> None: ...

    def close(self) -> None: ...


class MemoryStore:
    """What a hub without a journal does, plus one copy: the least that any store can do with the bytes."""

    def __init__(self, _directory: Path) -> None:
        self._payloads: dict[TrajectoryKey, list[bytes]] = {}

    def append(self, entries: Sequence[Entry]) -> None:
        for one in entries:
            self._payloads |= {key: [bytes(part) for part in frames] for key, frames in one.payloads.items()}

    def release(self, keys: Sequence[TrajectoryKey]) -> None:
        for key in keys:
            del self._payloads[key]

    def read(self, key: TrajectoryKey) -> int:
        """Nothing moves"""
        return 0

    def sync(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        self._payloads.clear()


class DiskStore:
    """The disk itself: the bytes, one after the other, in files of a segment's size."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[int] = []
        self._written = 0

    def append(self, entries: Sequence[Entry]) -> None:
        if self._written % (256 << 20) == 0 or not self._files:
            path = self._directory / f"raw-{len(self._files)}"
            self._files.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        for one in entries:
            for frames in one.payloads.values():
                self._written += os.writev(self._files[-1], frames)

    def release(self, keys: Sequence[TrajectoryKey]) -> None:
        """The bytes stay until the benchmark's directory goes."""

    def read(self, key: TrajectoryKey) -> int:
        """The raw rate is one of writing"""
        return 0

    def sync(self) -> None:
        for descriptor in self._files:
            os.fdatasync(descriptor)

    def close(self) -> None:
        for descriptor in self._files:
            os.close(descriptor)


class JournalStore:
    def __init__(self, directory: Path, fsync: bool = False) -> None:
        self.journal = Journal.open(directory / "journal", fsync=fsync).journal
        self._directory = directory / "journal"

    def append(self, entries: Sequence[Entry]) -> None:
        self.journal.append_all(entries)

    def release(self, keys: Sequence[TrajectoryKey]) -> None:
        self.journal.release(keys)

    def read(self, key: TrajectoryKey) -> int:
        return sum(frame.nbytes for frame in self.journal.read(key))

    def sync(self) -> None:
        for path in self._directory.glob("*.journal"):
            descriptor = os.open(path, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        self.journal.close()


class SqliteStore:
    """One table of events, one of payloads; each append one transaction. ``synchronous``: OFF survives SIGKILL too."""

    def __init__(self, directory: Path, synchronous: str = "OFF") -> None:
        self._path = directory / "journal.sqlite"
        self._base = sqlite3.connect(self._path, isolation_level=None)
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute(f"PRAGMA synchronous = {synchronous}")
        self._base.execute("CREATE TABLE event (number INTEGER PRIMARY KEY, body BLOB)")
        self._base.execute("CREATE TABLE payload (task INTEGER, sample INTEGER, part INTEGER, body BLOB)")
        self._base.execute("CREATE INDEX of_payload ON payload (task, sample)")

    def append(self, entries: Sequence[Entry]) -> None:
        self._base.execute("BEGIN")
        for one in entries:
            for (task, sample), frames in one.payloads.items():
                rows = ((task, sample, part, frame) for part, frame in enumerate(frames))
                self._base.executemany("INSERT INTO payload VALUES (?, ?, ?, ?)", rows)
            body = msgpack.packb([to_plain(event) for event in one.events])
            self._base.execute("INSERT INTO event (body) VALUES (?)", (body,))
        self._base.execute("COMMIT")

    def release(self, keys: Sequence[TrajectoryKey]) -> None:
        self._base.execute("BEGIN")
        self._base.executemany("DELETE FROM payload WHERE task = ? AND sample = ?", keys)
        self._base.execute("COMMIT")

    def read(self, key: TrajectoryKey) -> int:
        rows = self._base.execute("SELECT body FROM payload WHERE task = ? AND sample = ? ORDER BY part", key)
        return sum(len(body) for (body,) in rows)

    def sync(self) -> None:
        self._base.execute("PRAGMA wal_checkpoint(FULL)")
        descriptor = os.open(self._path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        self._base.close()
