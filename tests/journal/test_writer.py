"""The writer for asyncio: order, batching, bounds and its death."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from slime_async.queue import Snapshot
from slime_async.queue.events import BatchShape, Committed
from slime_async.transport.journal import Journal, JournalError, JournalWriter
from tests.journal.examples import accepted, frames, key, read_all

T = TypeVar("T")
EMPTY = Snapshot(BatchShape(4, 1), 0, False, 0, 0, 1, -1, 0, {}, (), (), (), (), {})


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 60))


class Gate:
    """Holds the writer's thread inside a write until it is opened."""

    def __init__(self, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, self.left = threading.Event(), threading.Event(), threading.Event()
        self.batches: list[int] = []
        original = journal.append_all

        def append_all(entries: Any) -> Any:
            self.batches.append(len(entries))
            self.reached.set()
            assert self.opened.wait(60)
            try:
                return original(entries)
            finally:
                self.left.set()

        monkeypatch.setattr(journal, "append_all", append_all)


def test_appends_are_written_in_the_order_of_the_calls_and_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path).journal
    gate = Gate(journal, monkeypatch)

    async def play() -> None:
        writer = JournalWriter(journal)
        appends = [writer.append([accepted(n)], {key(n): frames(n)}) for n in range(20)]
        empty = writer.append((), {})
        await asyncio.to_thread(gate.reached.wait, 60)
        gate.opened.set()
        positions = await asyncio.gather(*appends)
        assert positions == sorted(set(positions))
        assert await empty == positions[-1]
        await writer.close()

    run(play())
    assert gate.batches == [1, 20]
    opened = Journal.open(tmp_path)
    assert list(opened.events) == [accepted(n) for n in range(20)]
    read_all(opened.journal, range(20))
    opened.journal.close()


def test_a_caller_that_is_cancelled_leaves_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path).journal
    gate = Gate(journal, monkeypatch)

    async def wait_for(written: Awaitable[object]) -> None:
        await written

    async def play() -> None:
        writer = JournalWriter(journal)
        tasks = [asyncio.create_task(wait_for(writer.append([accepted(n)], {}))) for n in range(3)]
        await asyncio.to_thread(gate.reached.wait, 60)
        tasks[1].cancel()
        gate.opened.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [False, True, False]
        await writer.close()

    run(play())
    opened = Journal.open(tmp_path)
    assert list(opened.events) == [accepted(n) for n in range(3)]
    opened.journal.close()


def test_room_waits_while_too_many_bytes_are_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path).journal
    gate = Gate(journal, monkeypatch)

    async def play() -> None:
        writer = JournalWriter(journal, batch_bytes=2000, pending_bytes=3000)
        await writer.room()
        appends = [writer.append([accepted(n)], {key(n): frames(n, 1000)}) for n in range(4)]
        room = asyncio.create_task(writer.room())
        await asyncio.to_thread(gate.reached.wait, 60)
        assert not room.done()
        gate.opened.set()
        await room
        await asyncio.gather(*appends)
        await writer.close()

    run(play())
    assert gate.batches == [1, 1, 1, 1]


def test_releases_and_snapshots_keep_their_place_among_appends(tmp_path: Path) -> None:
    async def play() -> None:
        writer = JournalWriter(Journal.open(tmp_path, segment_bytes=500, events_bytes=500).journal)
        for number in range(50):
            written = writer.append([accepted(number)], {key(number): frames(number, 200)})
            writer.release([key(number - 5)] if number >= 5 else [])
            writer.maybe_compact(lambda: EMPTY)
            if number % 7 == 0:
                await written
        await writer.append([Committed(50)], {})
        await writer.close()

    run(play())
    opened = Journal.open(tmp_path, segment_bytes=500)
    assert opened.events[0] == EMPTY
    assert opened.events[-1] == Committed(50)
    opened.journal.retain([key(number) for number in range(45, 50)])
    read_all(opened.journal, range(45, 50), 200)
    assert len(list(tmp_path.glob("payloads-*"))) <= 4
    opened.journal.close()


def test_releases_do_not_keep_appends_from_going_out_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path).journal
    gate = Gate(journal, monkeypatch)

    async def play() -> None:
        writer = JournalWriter(journal)
        for number in range(10):
            writer.append([accepted(number)], {key(number): frames(number)})
            writer.release([key(number - 1)])
        written = writer.append([], {key(3): frames(33)})
        await asyncio.to_thread(gate.reached.wait, 60)
        gate.opened.set()
        await written
        assert [bytes(frame) for frame in journal.read(key(3))] == frames(33)
        await writer.close()

    run(play())
    assert gate.batches == [1, 9, 1]
    opened = Journal.open(tmp_path)
    assert list(opened.events) == [accepted(number) for number in range(10)]
    opened.journal.close()


def test_close_writes_what_is_pending(tmp_path: Path) -> None:
    async def play() -> None:
        writer = JournalWriter(Journal.open(tmp_path).journal, batch_bytes=100)
        appends = [writer.append([accepted(n)], {key(n): frames(n)}) for n in range(10)]
        await writer.close()
        assert all(written.done() for written in appends)

    run(play())
    opened = Journal.open(tmp_path)
    assert len(opened.events) == 10
    opened.journal.close()


def test_a_write_that_does_not_end_counts_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path).journal
    gate = Gate(journal, monkeypatch)

    async def play() -> None:
        writer = JournalWriter(journal, deadline_s=0.05)
        with pytest.raises(JournalError, match="a write has not ended after 0 s: see that the disk is healthy"):
            await writer.append([accepted(0)], {})
        with pytest.raises(JournalError, match="a write has not ended"):
            await writer.watch()
        with pytest.raises(JournalError, match="a write has not ended"):
            await writer.close()
        gate.opened.set()

    run(play())
    assert gate.left.wait(60)  # the files are the thread's until then
    journal.close()


def test_a_mistake_of_ours_surfaces_too(tmp_path: Path) -> None:
    async def play(spoil: Callable[[JournalWriter], Awaitable[object]]) -> None:
        writer = JournalWriter(Journal.open(tmp_path).journal)
        with pytest.raises(TypeError):
            await spoil(writer)
        with pytest.raises(TypeError):
            await writer.watch()
        with pytest.raises(TypeError):
            await writer.close()

    run(play(lambda writer: writer.append([object()], {key(0): frames(0)})))  # type: ignore[list-item]
    opened = Journal.open(tmp_path)
    assert (opened.events, opened.keys, opened.truncated_bytes) == ((), frozenset(), 0)
    opened.journal.close()
