"""The hub's memory on disk: every event of the queue, and the payload of every trajectory that is still needed.

::

    journal/  lock                      held by the hub that writes here
              events-00000001.journal   every event, in order, for ever (``trail``): the audit's evidence
              events-00000002.journal   begins with a snapshot: a restart reads the newest only
              payloads-00000007.journal trajectories' bytes (``payloads``), deleted when nobody needs them

What an append promises when it returns: it survives the death of this process at any moment; with ``fsync`` also the
loss of power. Payloads are written before the events that speak of them, and each append's events are one record, so
what a restart finds is the state after some append, never half of one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from slime_async.queue import Event, Snapshot
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.buffers import Buffer
from slime_async.transport.journal.errors import JournalCorrupt, JournalError
from slime_async.transport.journal.lock import DirectoryLock
from slime_async.transport.journal.payloads import PayloadLog
from slime_async.transport.journal.placement import Appended
from slime_async.transport.journal.recovery import recover
from slime_async.transport.journal.segment import PARTIAL, segment_paths
from slime_async.transport.journal.trail import Needs, Position, Trail

log = logging.getLogger(__name__)
SNAPSHOT_SHARE = 4
"""A new snapshot is due once the events since the last take this many times its size: a fifth of the trail at most"""


class Entry(NamedTuple):
    """What is appended in one piece: events, and the frames of the trajectories that they accept."""

    events: Sequence[Event]
    payloads: Mapping[TrajectoryKey, Sequence[Buffer]]


@dataclass(frozen=True, slots=True)
class JournalStatistics:
    """Counts are since the journal was opened; sizes are of what is on disk now."""

    appends: int
    events: int
    payloads: int
    moved_bytes: int
    """Payloads copied so that their segment could be deleted"""
    live_bytes: int
    """Payloads somebody needs"""
    payload_bytes: int
    """All payload segments"""
    trail_bytes: int
    """All events of the run"""


class Journal:
    """Synchronous. One thread at a time may write; any thread may ``read``. See ``JournalWriter`` for asyncio."""

    def __init__(
        self, directory: Path, lock: DirectoryLock, trail: Trail, payloads: PayloadLog, fsync: bool, events_bytes: int
    ) -> None:
        """``open`` makes one."""
        self._directory = directory
        self._lock = lock
        self._trail = trail
        self._payloads = payloads
        self._fsync = fsync
        self._events_bytes = events_bytes
        self._broken: JournalError | None = None
        self._index = threading.Lock()
        """Where payloads lie, and which files are open: readers may be other threads"""
        self._counts = {"appends": 0, "events": 0, "payloads": 0, "moved_bytes": 0}

    @classmethod
    def open(
        cls, directory: Path, *, fsync: bool = False, segment_bytes: int = 256 << 20, events_bytes: int = 8 << 20
    ) -> Opened:
        """Make a journal, or carry one on. Give what ``queue.payload_keys`` says after the replay to ``retain``.

        ``segment_bytes`` is the size of a payload segment, the unit in which the disk is given back; ``events_bytes``
        the least that is appended between two snapshots. Raises ``JournalInUse``, ``JournalVersionError``,
        ``JournalCorrupt`` and ``JournalError``; a journal that is refused is left as it is.
        """
        with ExitStack() as undo, _telling(directory, "opening the journal"):
            directory.mkdir(parents=True, exist_ok=True)
            lock = DirectoryLock(directory)
            undo.callback(lock.close)
            for partial in directory.glob(f"*{PARTIAL}"):
                partial.unlink()  # it never got its name: nothing depends on it
            new = not segment_paths(directory, "events")
            payloads, payload_scan = PayloadLog.open(directory, segment_bytes, create=new)
            undo.callback(payloads.close)
            if new and payloads.untouched:
                Trail.create(directory).close()
            trail, entries, trail_scan = Trail.open(directory)
            undo.callback(trail.close)
            kept, truncated_bytes = recover(trail, entries, trail_scan, payloads, payload_scan)
            undo.pop_all()
        journal = cls(directory, lock, trail, payloads, fsync, events_bytes)
        events = tuple(event for entry in kept for event in entry.events)
        return Opened(journal, events, payloads.keys, truncated_bytes)

    # ----------------------------------------------------------------------------------------------- writing

    def append(self, events: Sequence[Event], payloads: Mapping[TrajectoryKey, Sequence[Buffer]]) -> Position:
        """Write both, payloads first; the position after them. Buffers are written from where they are.

        Raises ``JournalError`` when the system refuses; then nothing was appended, and it may be tried again.
        """
        return self.append_all([Entry(events, payloads)])[0]

    def append_all(self, entries: Sequence[Entry]) -> list[Position]:
        """Several appends in one write (of each log); each is there as a whole or not at all, in this order.

        One without anything in it is no write; its position says what it comes after.
        """
        self._check()
        appended, trail_end = None, self._trail.end
        try:
            with _telling(self._payloads.path, "writing payloads"):
                appended, ends = self._payloads.append([entry.payloads for entry in entries])
                self._sync(self._payloads)
            with _telling(self._trail.path, "writing events"):
                needs = [Needs(payload_end, self._fsync) for payload_end in ends]
                positions = self._trail.append(zip((entry.events for entry in entries), needs, strict=True))
                self._sync(self._trail)
        except BaseException:
            self._take_back(appended, trail_end)
            raise
        with self._index:
            self._payloads.keep(appended.locations)
        self._counts["appends"] += len(entries)
        self._counts["events"] += sum(len(entry.events) for entry in entries)
        self._counts["payloads"] += len(appended.locations)
        return positions

    def release(self, keys: Iterable[TrajectoryKey]) -> None:
        """Nobody needs these payloads any more; full segments without any others are deleted.

        The events that made them unneeded (dropped, durable) must have been appended before.
        """
        with self._index:
            self._payloads.release(keys)
        self._delete_dead()

    def retain(self, needed: Collection[TrajectoryKey]) -> None:
        """After a restart: release everything but ``needed``, which the replayed queue's ``payload_keys`` names.

        Raises ``JournalCorrupt`` when one of them is not on disk.
        """
        if missing := sorted(set(needed) - self._payloads.keys):
            shown = ", ".join(f"({key.task}, {key.sample})" for key in missing[:5])
            raise JournalCorrupt(self._directory, f"{len(missing)} payloads that the run needs are not here: {shown}")
        self.release(self._payloads.keys - frozenset(needed))

    def maybe_compact(self, snapshot: Callable[[], Snapshot]) -> None:
        """``compact`` when it is due; ``snapshot`` is only called then. Cheap: ask after every commit."""
        if self.snapshot_due:
            self.compact(snapshot)
        else:
            self.tidy()

    def compact(self, snapshot: Callable[[], Snapshot]) -> None:
        """``tidy``, and begin a new segment of events with the queue's state: a restart need not read what is before.

        ``snapshot`` must be the state after everything that was appended, and nothing else.
        """
        self.tidy()
        with self._breaking(self._trail.path, "beginning a segment of events"):
            self._payloads.sync()  # whatever the snapshot needs is safer than the snapshot
            self._trail.rotate(snapshot(), Needs(self._payloads.end, synced=True))

    def tidy(self) -> None:
        """Keep the disk's use within its bound, by moving payloads out of segments that are mostly dead."""
        self._check()
        while (number := self._payloads.segment_to_empty()) is not None:
            for key in self._payloads.payloads_of(number):
                self._move(key)
            with self._breaking(self._payloads.path, "fsync"):
                self._payloads.sync()
            self._delete_dead()

    @property
    def snapshot_due(self) -> bool:
        since = self._trail.end.offset - self._trail.snapshot_bytes
        return since >= max(self._events_bytes, SNAPSHOT_SHARE * self._trail.snapshot_bytes)

    # ----------------------------------------------------------------------------------------------- reading

    def read(self, key: TrajectoryKey) -> list[memoryview]:
        """The payload's frames as they were appended, each in memory of its own, checked against their checksum.

        Raises ``KeyError`` for a key without payload, ``JournalCorrupt`` and ``JournalError``.
        """
        with self._index, _telling(self._directory, f"reading the payload of {key}"):
            return self._payloads.read(key)

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def position(self) -> Position:
        """The end of the events: greater after every append, over restarts and compactions too."""
        return self._trail.end

    @property
    def disk_bytes(self) -> int:
        return self._trail.size_bytes + self._payloads.size_bytes

    @property
    def statistics(self) -> JournalStatistics:
        with self._index:
            return JournalStatistics(
                **self._counts,
                live_bytes=self._payloads.live_bytes,
                payload_bytes=self._payloads.size_bytes,
                trail_bytes=self._trail.size_bytes,
            )

    def close(self) -> None:
        """Needed only to let another hub in: nothing is buffered."""
        with self._index:
            self._trail.close()
            self._payloads.close()
            self._lock.close()

    # ----------------------------------------------------------------------------------------------- private

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _sync(self, part: Trail | PayloadLog) -> None:
        if self._fsync:
            with self._breaking(part.path, "fsync"):
                part.sync()

    @contextmanager
    def _breaking(self, path: Path, doing: str) -> Iterator[None]:
        """Nothing can be appended after a failure in here: what is on disk is no longer known."""
        try:
            with _telling(path, doing):
                yield
        except JournalError as error:
            self._broken = error
            raise

    def _take_back(self, appended: Appended | None, trail_end: Position) -> None:
        """``appended``: the payloads of a write whose rest failed; None where they failed themselves."""
        with self._breaking(self._directory, "taking back a write that failed"):
            self._payloads.cut(self._payloads.end if appended is None else appended.before)
            self._trail.cut(trail_end)

    def _delete_dead(self) -> None:
        if dead := self._payloads.dead_segments():
            with self._breaking(self._directory, "deleting payloads"):
                self._trail.sync()  # the events that made them unneeded outlive a loss of power, or they do
            with self._index, _telling(self._directory, "deleting payloads"):
                self._payloads.delete(dead)

    def _move(self, key: TrajectoryKey) -> None:
        """To the end of the log."""
        frames = self._payloads.read(key)
        try:
            with _telling(self._payloads.path, "moving payloads"):
                moved, _ = self._payloads.append([{key: frames}])
        except BaseException:
            self._take_back(None, self._trail.end)
            raise
        with self._index:
            self._payloads.keep(moved.locations)
        self._counts["moved_bytes"] += sum(frame.nbytes for frame in frames)


class Opened(NamedTuple):
    """A journal, and what was in it."""

    journal: Journal
    events: tuple[Event, ...]
    """For ``TrajectoryQueue.replay``; the first may be a snapshot"""
    keys: frozenset[TrajectoryKey]
    """Payloads on disk: those needed, and some that are not any more"""
    truncated_bytes: int
    """Of a write that was not finished, cut off and logged; 0 in most cases"""


@contextmanager
def _telling(path: Path, doing: str) -> Iterator[None]:
    """System calls that fail become ``JournalError``."""
    try:
        yield
    except OSError as error:
        raise JournalError.from_os(path, doing, error) from error
