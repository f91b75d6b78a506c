"""The journal for asyncio: one thread writes; whoever appends while it does goes out together in the next write.

::

    hub's loop                                     writer's thread
    await append(events, payloads) ─┐
    await append(events, payloads) ─┼─ in order ─► append_all([…])   one write of each log, one fsync
    release(keys) ──────────────────┘              release(keys)
              ◄──────────── all of them are on disk ────┘

A write that fails fails everybody who waits and everybody who comes later: events that the queue has applied are not
on disk, so this hub cannot go on. The journal itself is whole, and another hub carries on from it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from slime_async.queue import Event, Snapshot
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.buffers import Buffer
from slime_async.transport.journal.errors import JournalError
from slime_async.transport.journal.journal import Entry, Journal
from slime_async.transport.journal.trail import Position


@dataclass(frozen=True, slots=True, eq=False)
class _Append:
    entry: Entry
    size_bytes: int
    written: asyncio.Future[Position]


@dataclass(frozen=True, slots=True, eq=False)
class _Release:
    keys: frozenset[TrajectoryKey]
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Compact:
    """Exactly in its place among the appends: the snapshot is of what was appended before."""

    action: Callable[[], None]
    size_bytes: int = 0


_Job = _Append | _Release | _Compact


class JournalWriter:
    """Made in the loop that uses it; closes the journal in ``close``. No call but ``close`` waits for the disk itself.

    ``batch_bytes`` of payloads go out in one write at most (or one append, if it is larger); ``room`` waits while
    more than ``pending_bytes`` are on their way; a write that takes ``deadline_s`` counts as failed.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        batch_bytes: int = 64 << 20,
        pending_bytes: int = 256 << 20,
        deadline_s: float = 120.0,
    ) -> None:
        self._journal = journal
        self._batch_bytes = batch_bytes
        self._max_pending_bytes = pending_bytes
        self._deadline_s = deadline_s
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "journal")
        self._jobs: deque[_Job] = deque()
        self._pending_bytes = 0
        self._writing: asyncio.Future[list[Position]] | None = None
        self._moved = asyncio.Event()
        """Set, and replaced, whenever a write ends"""
        self._failure: BaseException | None = None

    def append(
        self, events: Sequence[Event], payloads: Mapping[TrajectoryKey, Sequence[Buffer]]
    ) -> asyncio.Future[Position]:
        """Done when the records are on disk; appends are written in the order of the calls, also where the caller is
        cancelled before that. An empty one is done when everything before it is.

        Raises ``JournalError`` (when awaited). Hand in events as soon as the queue has emitted them, without awaiting
        anything in between: the order of the calls must be the order of the events.
        """
        size = sum(memoryview(frame).nbytes for frames in payloads.values() for frame in frames)
        job = _Append(Entry(tuple(events), payloads), size, self._loop.create_future())
        if self._failure is not None:
            job.written.set_exception(self._failure)
        else:
            self._enqueue(job)
        return job.written

    def release(self, keys: Iterable[TrajectoryKey]) -> None:
        """``Journal.release``, after everything that was appended before."""
        if released := frozenset(keys):
            self._enqueue(_Release(released))

    def maybe_compact(self, snapshot: Callable[[], Snapshot]) -> None:
        """``Journal.maybe_compact``. ``snapshot`` is called now if at all: append the queue's events before."""
        if self._journal.snapshot_due:
            state = snapshot()
            self._enqueue(_Compact(partial(self._journal.maybe_compact, lambda: state)))
        else:
            self._enqueue(_Compact(self._journal.tidy))

    async def room(self) -> None:
        """Wait while too many bytes are on their way; to be awaited before the queue is asked to take more.

        Raises what the writer died of.
        """
        while self._failure is None and self._pending_bytes > self._max_pending_bytes:
            await self._moved.wait()
        if self._failure is not None:
            raise self._failure

    async def watch(self) -> None:
        """Never returns; raises what the writer dies of. For the hub's own supervision."""
        while self._failure is None:
            await self._moved.wait()
        raise self._failure

    async def close(self) -> None:
        """Write what is pending, then close the journal. Raises ``JournalError`` when that fails or has failed."""
        while self._failure is None and self._writing is not None:
            await self._moved.wait()
        self._thread.shutdown(wait=False)
        if self._writing is None:  # otherwise the disk still holds the thread, which uses the files
            self._journal.close()
        if self._failure is not None:
            raise self._failure

    # ----------------------------------------------------------------------------------------------- private

    def _enqueue(self, job: _Job) -> None:
        if self._failure is None:
            self._jobs.append(job)
            self._pending_bytes += job.size_bytes
            if self._writing is None:
                self._write_next()

    def _write_next(self) -> None:
        jobs = self._take()
        if not jobs:
            return
        self._writing = self._loop.run_in_executor(self._thread, self._perform, jobs)
        problem = f"a write has not ended after {self._deadline_s:.0f} s"
        late = JournalError(self._journal.directory, problem, "see that the disk is healthy, then start the hub again")
        overdue = self._loop.call_later(self._deadline_s, self._fail, late, jobs)
        self._writing.add_done_callback(partial(self._written, jobs, overdue))

    def _take(self) -> list[_Job]:
        """The next jobs in order, as many as fit into one write."""
        jobs: list[_Job] = []
        size = 0
        while self._jobs and (not jobs or size + self._jobs[0].size_bytes <= self._batch_bytes):
            jobs.append(self._jobs.popleft())
            size += jobs[-1].size_bytes
        return jobs

    def _perform(self, jobs: Sequence[_Job]) -> list[Position]:
        """In the thread. The positions of the appends among them.

        Releases wait for the appends behind them, so that they don't keep these from going out together.
        """
        positions: list[Position] = []
        entries: list[Entry] = []
        released: set[TrajectoryKey] = set()

        def write() -> None:
            nonlocal positions
            positions += self._journal.append_all(entries) if entries else []
            self._journal.release(released)
            entries.clear()
            released.clear()

        for job in jobs:
            match job:
                case _Append(entry):
                    if not released.isdisjoint(entry.payloads):  # a key that comes again after its release
                        write()
                    entries.append(entry)
                case _Release(keys):
                    released |= keys
                case _Compact(action):
                    write()
                    action()
        write()
        return positions

    def _written(
        self, jobs: Sequence[_Job], overdue: asyncio.TimerHandle, writing: asyncio.Future[list[Position]]
    ) -> None:
        overdue.cancel()
        self._writing = None
        self._pending_bytes -= sum(job.size_bytes for job in jobs)
        error = writing.exception()
        if error is not None:
            self._fail(error, jobs)
            return
        appends = (job for job in jobs if isinstance(job, _Append))
        for job, position in zip(appends, writing.result(), strict=True):
            if not job.written.done():  # its caller may have been cancelled
                job.written.set_result(position)
        self._write_next()
        self._wake()

    def _fail(self, error: BaseException, jobs: Sequence[_Job]) -> None:
        self._failure = self._failure or error
        for job in (*jobs, *self._jobs):
            if isinstance(job, _Append) and not job.written.done():
                job.written.set_exception(self._failure)
        self._jobs.clear()
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()
