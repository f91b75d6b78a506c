"""The queue's state machine again, each of its lives rebuilt from a journal on disk that a dying hub has left.

Whatever was appended before the hub died is what the next one begins with: the same state as the pure queue's, every
payload that it names readable, and an audit of the whole trail that agrees. The append that it died in may be torn at
any byte.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from test_queue_machine import DURABLE_COUNTS, QueueMachine

from slime_async.audit import audit
from slime_async.queue import TrajectoryQueue
from slime_async.queue.events import Accepted, Event
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.journal import Journal, read_trail

SEGMENT_BYTES = 2000
"""Some ten payloads: whole segments die, and some are emptied, within a few steps"""


def payload_of(accepted: Accepted) -> list[bytes]:
    return [repr(accepted.meta).encode(), b"", bytes(accepted.meta.size_bytes)]


class JournalMachine(QueueMachine):
    def __init__(self) -> None:
        super().__init__()
        self.no_sync = mock.patch.multiple(os, fsync=mock.DEFAULT, fdatasync=mock.DEFAULT)
        self.no_sync.start()  # nobody cuts the power here: it would only take its time
        self.directory = Path(tempfile.mkdtemp(prefix="journal-"))
        self.disk = Journal.open(self.directory, segment_bytes=SEGMENT_BYTES).journal
        self.payloads: dict[TrajectoryKey, list[bytes]] = {}

    def drain(self) -> None:
        """As a hub does after every call: append what happened, then release what nobody needs."""
        events, released = len(self.journal), set(self.released)
        super().drain()
        self.append(self.journal[events:])
        self.disk.release(self.released - released)

    def append(self, events: list[Event]) -> None:
        payloads = {event.meta.key: payload_of(event) for event in events if isinstance(event, Accepted)}
        self.payloads |= payloads
        before = self.disk.position
        after = self.disk.append(events, payloads)
        assert after == self.disk.position
        assert after > before if events else after == before

    @rule()
    def the_journal_is_compacted(self) -> None:
        self.drain()
        before = self.disk.position
        self.disk.compact(self.queue.state)
        assert self.disk.position > before

    @rule()
    def the_journal_is_tidied(self) -> None:
        self.drain()
        self.disk.tidy()
        statistics = self.disk.statistics
        assert statistics.payload_bytes <= 4 * statistics.live_bytes + 4 * SEGMENT_BYTES

    @rule()
    def hub_restarts(self) -> None:
        self.drain()
        self.disk.close()
        assert self.reopen() == 0

    @precondition(lambda self: self.metas)
    @rule(data=st.data())
    def hub_is_killed_in_an_append(self, data: st.DataObject) -> None:
        """The last append reaches the disk up to some byte, payloads first; its caller was told nothing."""
        self.drain()
        newest = {kind: self.newest(kind) for kind in ("payloads", "events")}
        sizes = {path: path.stat().st_size for path in newest.values()}
        key = data.draw(st.sampled_from(sorted(self.metas)))
        self.disk.append([Accepted(self.metas[key], 0)], {TrajectoryKey(10_000, 0): [b"torn" * 20]})
        self.disk.close()
        header_bytes = 28
        payloads, events = self.newest("payloads"), self.newest("events")
        begin = sizes.get(payloads, header_bytes)
        written, total = payloads.stat().st_size - begin, events.stat().st_size - sizes[events]
        reached = data.draw(st.integers(0, written + total - 1))
        for path, end in (
            (payloads, begin + min(reached, written)),
            (events, sizes[events] + max(0, reached - written)),
        ):
            with path.open("r+b") as file:
                file.truncate(end)
        assert self.reopen() == (reached if reached < written else reached - written)

    def newest(self, kind: str) -> Path:
        return max(self.directory.glob(f"{kind}-*.journal"))

    def reopen(self) -> int:
        """A new hub on what is on disk, held against the pure model; the bytes that were cut."""
        before = self.queue.state(), [getattr(self.statistics(), name) for name in DURABLE_COUNTS]
        opened = Journal.open(self.directory, segment_bytes=SEGMENT_BYTES)
        self.disk = opened.journal
        self.queue = TrajectoryQueue.replay(self.limits, self.new_stream(), opened.events)
        self.queue.take_released()
        assert self.queue.take_events() == ()
        assert (self.queue.state(), [getattr(self.statistics(), name) for name in DURABLE_COUNTS]) == before
        assert TrajectoryQueue.replay(self.limits, self.new_stream(), self.journal).state() == before[0]
        needed = self.queue.payload_keys()
        assert opened.keys >= set(needed)
        self.disk.retain(needed)
        for key in needed:
            assert [bytes(frame) for frame in self.disk.read(key)] == self.payloads[key]
        self.audit_agrees()
        for actor, held in self.running.items():
            self.lost += held
            self.running[actor] = []
        return opened.truncated_bytes

    def audit_agrees(self) -> None:
        report, s = audit(read_trail(self.directory), (), finished=False), self.statistics()
        assert report.violations == ()
        assert (report.accepted, report.trained, report.queued) == (s.accepted, s.trained + s.durable, s.queued)
        assert (report.leased, report.to_retrain, sum(report.dropped.values())) == (s.leased, s.to_retrain, s.dropped)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "limits"):
            self.drain()
            self.audit_agrees()
        self.disk.close()
        shutil.rmtree(self.directory)
        self.no_sync.stop()


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=25, stateful_step_count=50)
