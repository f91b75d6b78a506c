"""What an open journal does."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from slime_async.queue import Event, Snapshot, TrajectoryMeta
from slime_async.queue.events import BatchShape, Committed, GroupDropped
from slime_async.trajectory import TaskRef
from slime_async.transport.journal import Journal, JournalCorrupt, JournalInUse, JournalVersionError, read_trail
from slime_async.transport.journal import records as format_of
from tests.journal.examples import accepted, append, frames, key, read_all, segments, write_run

EMPTY = Snapshot(BatchShape(4, 1), 0, False, 0, 0, 1, -1, 0, {}, (), (), (), (), {})


def test_what_was_appended_is_there_when_the_journal_is_opened_again(tmp_path: Path) -> None:
    written = write_run(tmp_path / "journal", 20)
    opened = Journal.open(tmp_path / "journal")
    assert list(opened.events) == written
    assert opened.keys == {key(number) for number in range(20)}
    assert opened.truncated_bytes == 0
    read_all(opened.journal, range(20))
    opened.journal.close()


@pytest.mark.parametrize("fsync", [False, True])
def test_a_new_journal_is_empty_and_every_append_moves_its_position(tmp_path: Path, fsync: bool) -> None:
    opened = Journal.open(tmp_path, fsync=fsync)
    assert (opened.events, opened.keys, opened.truncated_bytes) == ((), frozenset(), 0)
    journal, positions = opened.journal, [opened.journal.position]
    for number in range(3):
        positions.append(journal.append([accepted(number)], {key(number): frames(number)}))
        assert positions[-1] == journal.position
    journal.compact(lambda: EMPTY)
    positions.append(journal.position)
    assert positions == sorted(set(positions))
    assert journal.statistics.payloads == 3
    journal.close()


def test_arrays_come_back_aligned_whatever_their_types(tmp_path: Path) -> None:
    arrays = [np.arange(7).astype(kind) for kind in ("uint8", "float16", "bool", "float32", "int64")]
    journal = Journal.open(tmp_path).journal
    journal.append([accepted(0)], {key(0): [array.data for array in arrays]})
    for array, frame in zip(arrays, journal.read(key(0)), strict=True):
        back = np.frombuffer(frame, array.dtype)
        assert back.flags.aligned
        np.testing.assert_array_equal(back, array)
    journal.close()


def test_the_last_payload_of_a_key_counts(tmp_path: Path) -> None:
    """A hub that was killed before the event was written accepts another attempt later."""
    journal = Journal.open(tmp_path).journal
    journal.append([], {key(1): frames(77)})
    append(journal, 1)
    journal.close()
    opened = Journal.open(tmp_path)
    read_all(opened.journal, [1])
    opened.journal.close()


def test_a_payload_that_was_released_cannot_be_read(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path).journal
    append(journal, 1)
    journal.release([key(1), key(2)])
    with pytest.raises(KeyError):
        journal.read(key(1))
    journal.close()


def test_segments_are_deleted_when_nobody_needs_their_payloads(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, segment_bytes=1000).journal
    for number in range(200):
        append(journal, number, size=200)
        if number >= 10:
            journal.release([key(number - 10)])
        assert len(segments(tmp_path, "payloads")) <= 7
        assert journal.disk_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.journal"))
    journal.close()
    opened = Journal.open(tmp_path, segment_bytes=1000)
    opened.journal.retain([key(number) for number in range(190, 200)])
    read_all(opened.journal, range(190, 200), size=200)
    opened.journal.release(opened.keys)
    assert len(segments(tmp_path, "payloads")) == 1
    opened.journal.close()


def test_a_few_old_payloads_are_moved_rather_than_keep_segments_alive(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, segment_bytes=2000).journal
    kept = range(0, 400, 40)
    for number in range(400):
        append(journal, number, size=200)
        if number not in kept:
            journal.release([key(number)])
        journal.maybe_compact(lambda: EMPTY)
        statistics = journal.statistics
        assert statistics.payload_bytes <= 4 * statistics.live_bytes + 3 * 2400
    assert 0 < statistics.moved_bytes < 400 * 300 / 3
    journal.close()
    opened = Journal.open(tmp_path, segment_bytes=2000)
    opened.journal.retain([key(number) for number in kept])
    read_all(opened.journal, kept, size=200)
    opened.journal.close()


def test_a_queue_that_is_used_up_nearly_in_order_is_never_copied(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, segment_bytes=2000).journal
    ends = {number: number + (24 if number % 10 == 0 else 12) for number in range(200)}
    for number in range(200):
        append(journal, number, size=200)
        journal.release([key(old) for old, end in ends.items() if end == number])
        journal.maybe_compact(lambda: EMPTY)
    assert journal.statistics.moved_bytes == 0
    journal.close()


def test_a_compacted_journal_begins_with_the_snapshot_and_the_trail_keeps_everything(tmp_path: Path) -> None:
    written = write_run(tmp_path, 8)
    journal = Journal.open(tmp_path).journal
    journal.compact(lambda: EMPTY)
    journal.append([Committed(1)], {})
    journal.close()
    opened = Journal.open(tmp_path)
    assert opened.events == (EMPTY, Committed(1))
    assert list(read_trail(tmp_path)) == [*written, EMPTY, Committed(1)]
    read_all(opened.journal, range(8))
    opened.journal.close()


def test_a_snapshot_is_taken_when_the_events_since_the_last_outweigh_it(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, events_bytes=1000).journal
    taken = 0

    def snapshot() -> Snapshot:
        nonlocal taken
        taken += 1
        return EMPTY

    for number in range(100):
        append(journal, number)
        journal.maybe_compact(snapshot)
    assert 5 <= taken <= 20
    assert len(segments(tmp_path, "events")) == taken + 1
    journal.close()


def test_events_before_a_snapshot_are_kept_in_a_third_of_the_space(tmp_path: Path) -> None:
    written = write_run(tmp_path, 500)
    before = segments(tmp_path, "events")[0].stat().st_size
    journal = Journal.open(tmp_path).journal
    journal.compact(lambda: EMPTY)
    assert segments(tmp_path, "events")[0].stat().st_size < before / 3
    assert journal.disk_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.journal"))
    assert list(read_trail(tmp_path)) == [*written, EMPTY]
    journal.close()


def test_the_number_of_the_format_changes_with_the_events() -> None:
    """Events are written field by field, without names: a journal of other events must be refused by its format."""
    classes = (*get_args(Event), TrajectoryMeta, TaskRef)
    layout = sorted((cls.__name__, [(field.name, field.type) for field in fields(cls)]) for cls in classes)
    digest = hashlib.sha256(repr(layout).encode()).hexdigest()[:16]
    assert (format_of.FORMAT_VERSION, digest) == (2, "0534d711702f9abb"), "raise FORMAT_VERSION, and note both here"


def test_a_second_hub_is_refused(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path).journal
    with pytest.raises(JournalInUse, match=r"process \d+ has this journal open: a journal has one hub"):
        Journal.open(tmp_path)
    code = f"""import pathlib
from slime_async.transport.journal import Journal
Journal.open(pathlib.Path({str(tmp_path)!r}))"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "JournalInUse" in other.stderr
    journal.close()
    Journal.open(tmp_path).journal.close()


def test_a_needed_payload_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    opened = Journal.open(tmp_path)
    with pytest.raises(JournalCorrupt, match=r"1 payloads that the run needs are not here: \(0, 3\)"):
        opened.journal.retain([key(0), key(3)])
    opened.journal.close()


def test_another_format_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, 2)
    monkeypatch.setattr(format_of, "FORMAT_VERSION", 3)
    with pytest.raises(JournalVersionError, match="has format 2, this release reads format 3: carry the run on with"):
        Journal.open(tmp_path)


def test_events_of_one_append_are_all_there_or_none(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path).journal
    journal.append([accepted(0)], {})
    whole = segments(tmp_path, "events")[0].stat().st_size
    journal.append([accepted(3), GroupDropped(0, "equal_rewards")], {})
    journal.close()
    path = segments(tmp_path, "events")[0]
    data = path.read_bytes()
    for end in range(whole, len(data)):
        path.write_bytes(data[:end])
        opened = Journal.open(tmp_path)
        assert opened.events == (accepted(0),)
        assert opened.truncated_bytes == end - whole
        opened.journal.close()
