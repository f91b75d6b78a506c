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

from collections.abc import Iterable
from pathlib import Path

from slime_async.config import Config
from slime_async.queue import QueueLimits, TaskStream, TrajectoryQueue
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.codec import EncodedTrajectory, Limits, ReceivedTrajectory, decode_trajectory
from slime_async.transport.journal import Journal
from slime_async.transport.journal.writer import JournalWriter


class Store:
    """Keeps the queue's promises across a restart. One instance lives in the hub's event loop."""

    def __init__(self, queue: TrajectoryQueue, writer: JournalWriter | None, limits: Limits, *, recovered: bool) -> None:
        self.queue = queue
        self.recovered = recovered
        """The queue is that of a hub before this one"""
        self._writer = writer
        self._limits = limits
        self._memory: dict[TrajectoryKey, ReceivedTrajectory] = {}
        self._staged: dict[TrajectoryKey, ReceivedTrajectory] = {}
        """Accepted, but not handed to the journal yet"""

    @classmethod
    def open(cls, config: Config, run_directory: Path | None, limits: Limits) -> Store:
        """The queue as the journal in ``run_directory`` left it, or a new one. Raises ``JournalError``.

        Without a directory, or with ``hub.journal`` off, nothing is on disk.
        """
        queue_limits, tasks = QueueLimits.from_config(config), TaskStream.from_config(config)
        if run_directory is None or not config.hub.journal:
            return cls(TrajectoryQueue(queue_limits, tasks), None, limits, recovered=False)
        opened = Journal.open(run_directory / "journal", fsync=config.hub.journal_fsync)
        recovered = bool(opened.events)
        if recovered:
            queue = TrajectoryQueue.replay(queue_limits, tasks, opened.events)
            queue.take_released()
            opened.journal.retain(queue.payload_keys())
        else:
            queue = TrajectoryQueue(queue_limits, tasks)
        return cls(queue, JournalWriter(opened.journal), limits, recovered=recovered)

    def keep(self, trajectory: ReceivedTrajectory) -> None:
        """An accepted trajectory; its event is among those of the next ``persist``."""
        self._memory[trajectory.key] = trajectory
        self._staged[trajectory.key] = trajectory

    async def get(self, keys: Iterable[TrajectoryKey]) -> tuple[ReceivedTrajectory, ...]:
        """Payloads of a leased batch, which stay in memory until ``spill``."""
        for key in keys:
            if key not in self._memory:
                self._memory[key] = await self._read(key)
        return tuple(self._memory[key] for key in keys)

    def spill(self, train_version: int) -> None:
        """Trained: only a learner that restarts asks for that batch again, and the journal has it."""
        if self._writer is not None:
            for key in self.queue.batch_keys(train_version):
                self._memory.pop(key, None)

    def stage(self) -> None:
        """Hand everything that happened since the last call to the journal, in its order; forget what is released."""
        events, released = self.queue.take_events(), self.queue.take_released()
        for key in released:
            self._memory.pop(key, None)
        payloads, self._staged = self._staged, {}
        if self._writer is not None and (events or released):
            frames = {key: trajectory.encoded.flat for key, trajectory in payloads.items()}
            snapshot = self.queue.state() if self._writer.snapshot_due else None
            self._written = asyncio.ensure_future(self._write(events, frames, released, snapshot))
            self._written.add_done_callback(self._check)

    async def persist(self) -> None:
        """Returns once everything up to now survives the death of this process. Raises ``JournalError``."""
        self.stage()
        if self._written is not None:
            await asyncio.shield(self._written)
