"""What the hub holds: the queue's events and the trajectories' payloads, in memory and in the journal.

==========================  ==========  ==========
payload of                  in memory   on disk
==========================  ==========  ==========
queued, leased              yes         yes
trained, not yet durable    no          yes         kept for a learner that restarts from its checkpoint
durable, dropped            no          no
==========================  ==========  ==========

Without a journal (``hub.journal = false``) everything is in memory only, and dies with the hub.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from slime_async.config import Config
from slime_async.protocol import Report
from slime_async.queue import QueueLimits, TaskStream, TrajectoryQueue
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.codec import EncodedTrajectory, ReceivedTrajectory, decode_trajectory
from slime_async.transport.journal import Journal, JournalWriter, Position


class Store:
    """Keeps the queue's promises across a restart. One instance lives in the hub's event loop."""

    def __init__(self, queue: TrajectoryQueue, journal: Journal | None):
        self.queue = queue
        self._journal = journal
        self._writer = None if journal is None else JournalWriter(journal)
        self._memory: dict[TrajectoryKey, ReceivedTrajectory] = {}
        self._accepted: list[ReceivedTrajectory] = []
        """Not handed to the journal yet"""
        self._written: asyncio.Future[Position] | None = None
        """Of the latest append; all before it are written too when it is"""

    @classmethod
    def open(cls, config: Config, run_directory: Path | None) -> Store:
        """The queue as the journal in ``run_directory`` left it, or a new one; nothing is on disk without a directory,
        or with ``hub.journal`` off.

        Raises ``JournalError``, and ``ValueError`` for a journal of another batch shape.
        """
        limits, tasks = QueueLimits.from_config(config), TaskStream.from_config(config)
        if run_directory is None or not config.hub.journal:
            return cls(TrajectoryQueue(limits, tasks), None)
        opened = Journal.open(run_directory / "journal", fsync=config.hub.journal_fsync)
        if not opened.events:
            return cls(TrajectoryQueue(limits, tasks), opened.journal)
        queue = TrajectoryQueue.replay(limits, tasks, opened.events)
        queue.take_released()  # before the restart, or by the next line
        opened.journal.retain(queue.payload_keys())
        return cls(queue, opened.journal)

    @property
    def is_durable(self) -> bool:
        """Whether another hub can go on from here."""
        return self._journal is not None

    def keep(self, trajectory: ReceivedTrajectory) -> None:
        """An accepted trajectory; its event is among those of the next ``stage``."""
        self._memory[trajectory.key] = trajectory
        self._accepted.append(trajectory)

    async def get(self, keys: Sequence[TrajectoryKey]) -> tuple[ReceivedTrajectory, ...]:
        """The payloads of a leased batch, from wherever they are."""
        if missing := [key for key in keys if key not in self._memory]:
            await self.persist()
            self._memory |= await asyncio.to_thread(self._read, missing)
        return tuple(self._memory[key] for key in keys)

    def spill(self, train_version: int) -> None:
        """The batch is trained: only a learner that restarts asks for it again, and the journal has it."""
        if self._journal is not None:
            for key in self.queue.batch_keys(train_version):
                self._memory.pop(key, None)

    def stage(self) -> None:
        """Hand what happened since the last call to the journal, in its order; forget what is released."""
        events, released = self.queue.take_events(), self.queue.take_released()
        accepted, self._accepted = self._accepted, []
        for key in released:
            self._memory.pop(key, None)
        if self._journal is None or self._writer is None or not (events or released):
            return
        payloads = {t.key: (t.encoded.header, *t.encoded.frames) for t in accepted}
        self._written = self._writer.append(events, payloads)
        self._written.add_done_callback(_seen)
        self._writer.release(released)
        if released or self._journal.snapshot_due:
            self._writer.maybe_compact(self.queue.state)

    async def persist(self) -> None:
        """Returns once everything up to now survives the death of this process. Raises ``JournalError``."""
        self.stage()
        if self._writer is not None and self._written is not None:
            await asyncio.shield(self._written)
            await self._writer.room()

    async def watch(self) -> None:
        """Never returns; raises what the journal dies of."""
        if self._writer is not None:
            await self._writer.watch()
        await asyncio.Event().wait()

    def as_report(self) -> Report:
        memory: Report = {"payloads_in_memory": len(self._memory)}
        return memory if self._journal is None else {**memory, "journal_bytes": self._journal.disk_bytes}

    async def close(self) -> None:
        """Write what is left."""
        self.stage()
        if self._writer is not None:
            await self._writer.close()

    def _read(self, keys: Sequence[TrajectoryKey]) -> dict[TrajectoryKey, ReceivedTrajectory]:
        assert self._journal is not None, "without a journal, whatever is needed is in memory"
        read = {}
        for key in keys:
            header, *frames = self._journal.read(key)
            read[key] = decode_trajectory(EncodedTrajectory(bytes(header), tuple(frames)))
        return read


def _seen(written: asyncio.Future[Position]) -> None:
    """Its error is raised by ``persist`` and ``watch``: no "never retrieved" then."""
    if not written.cancelled():
        written.exception()
