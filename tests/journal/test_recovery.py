"""What a journal does with bytes that are not what was written: a state that was, or an error that says where."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime_async.queue.events import BatchShape
from slime_async.transport.journal import Journal, JournalCorrupt, JournalError, JournalVersionError, read_trail
from tests.journal.examples import accepted, append, frames, key, segments, write_run

COUNT = 2
HEADER = 28
SMALL = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def fresh(tmp_path: Path, *, fsync: bool = False) -> Path:
    """A journal of ``COUNT`` trajectories in a new directory."""
    directory = next(d for i in itertools.count() if not (d := tmp_path / f"journal-{i}").exists())
    journal = Journal.open(directory, fsync=fsync).journal
    journal.append([BatchShape(4, 1)], {})
    for number in range(COUNT):
        append(journal, number)
    journal.close()
    return directory


def assert_a_state_that_was(directory: Path) -> int:
    """Opens, holds a prefix of what was written with all its payloads, and can be carried on; the bytes cut."""
    opened = Journal.open(directory)
    written = [BatchShape(4, 1), *(accepted(number) for number in range(COUNT))]
    kept = len(opened.events)
    assert list(opened.events) == written[:kept]
    opened.journal.retain([key(number) for number in range(kept - 1)])
    for number in range(kept - 1):
        assert [bytes(frame) for frame in opened.journal.read(key(number))] == frames(number)
    append(opened.journal, 17)
    opened.journal.close()
    again = Journal.open(directory)
    assert list(again.events) == [*written[:kept], accepted(17)]
    assert again.truncated_bytes == 0
    again.journal.close()
    return opened.truncated_bytes


def test_events_cut_off_at_every_byte_leave_the_state_before(tmp_path: Path) -> None:
    original = fresh(tmp_path)
    size = segments(original, "events")[0].stat().st_size
    for end in range(HEADER, size):
        directory = tmp_path / f"cut-{end}"
        shutil.copytree(original, directory)
        path = segments(directory, "events")[0]
        path.write_bytes(path.read_bytes()[:end])
        assert_a_state_that_was(directory)


def test_payloads_cut_off_at_every_byte_leave_the_state_before(tmp_path: Path) -> None:
    """More than a killed process does: power was lost without fsync, and took payloads whose events were kept."""
    original = fresh(tmp_path)
    size = segments(original, "payloads")[0].stat().st_size
    for end in range(HEADER, size):
        directory = tmp_path / f"cut-{end}"
        shutil.copytree(original, directory)
        path = segments(directory, "payloads")[0]
        path.write_bytes(path.read_bytes()[:end])
        assert assert_a_state_that_was(directory) > 0


def test_payloads_that_were_synced_and_are_gone_are_refused(tmp_path: Path) -> None:
    directory = fresh(tmp_path, fsync=True)
    path = segments(directory, "payloads")[0]
    before = path.read_bytes()
    path.write_bytes(before[:-1])
    with pytest.raises(JournalCorrupt, match=r"payloads-00000001.journal: at byte \d+: payloads end here, those of"):
        Journal.open(directory)
    assert path.read_bytes() == before[:-1]


def test_a_tail_of_zeros_is_cut_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = fresh(tmp_path)
    for kind in ("events", "payloads"):
        with segments(directory, kind)[0].open("ab") as file:
            file.write(bytes(1000))
    with caplog.at_level(logging.WARNING):
        assert assert_a_state_that_was(directory) == 2000
    assert "events-00000001.journal: cut 1000 bytes from byte" in caplog.text


@SMALL
@given(garbage=st.binary(min_size=1, max_size=300), kind=st.sampled_from(["events", "payloads"]))
def test_any_garbage_at_the_end_is_cut(tmp_path: Path, garbage: bytes, kind: str) -> None:
    directory = fresh(tmp_path)
    with segments(directory, kind)[0].open("ab") as file:
        file.write(garbage)
    assert assert_a_state_that_was(directory) == len(garbage)


@SMALL
@given(data=st.data(), kind=st.sampled_from(["events", "payloads"]), flip=st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_cut_and_never_believed(
    tmp_path: Path, data: st.DataObject, kind: str, flip: int
) -> None:
    directory = fresh(tmp_path)
    path = segments(directory, kind)[0]
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= flip
    path.write_bytes(content)
    outcome = opened_or_refused(directory)
    if isinstance(outcome, JournalCorrupt):
        assert outcome.path == path
        assert outcome.offset is not None
        assert outcome.offset <= at
        assert f"at byte {outcome.offset}" in str(outcome)
        assert "restore the journal's directory from a copy" in str(outcome)
        assert path.read_bytes() == content
    elif isinstance(outcome, JournalError):
        assert isinstance(outcome, JournalVersionError)
        assert 8 <= at < 10
        assert outcome.path == path
    else:
        last_record = 250 if kind == "events" else 120
        assert outcome > 0
        assert at > len(content) - last_record


def opened_or_refused(directory: Path) -> int | JournalError:
    try:
        return assert_a_state_that_was(directory)
    except JournalError as error:
        return error


@pytest.mark.parametrize("kind", ["events", "payloads"])
def test_damage_in_the_middle_is_refused_and_leaves_the_files_alone(tmp_path: Path, kind: str) -> None:
    directory = fresh(tmp_path)
    path = segments(directory, kind)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalCorrupt, match=rf"{kind}-00000001.journal: at byte \d+: .*: restore"):
        Journal.open(directory)
    assert path.read_bytes() == content


def test_damage_in_a_full_payload_segment_is_found_when_it_is_read(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, segment_bytes=200).journal
    for number in range(6):
        append(journal, number)
    path = segments(tmp_path, "payloads")[0]
    content = path.read_bytes()
    path.write_bytes(content.replace(frames(0)[0], frames(1)[0]))
    with pytest.raises(
        JournalCorrupt, match=r"payloads-00000001.journal: at byte 28: the payload of .* wrong checksum"
    ):
        journal.read(key(0))
    journal.close()


@pytest.mark.parametrize("kind", ["events", "payloads"])
def test_a_missing_segment_is_named(tmp_path: Path, kind: str) -> None:
    journal = Journal.open(tmp_path, segment_bytes=200).journal
    for number in range(6):
        append(journal, number)
    journal.close()
    for path in segments(tmp_path, kind)[-1:]:
        path.unlink()
    with pytest.raises(JournalCorrupt, match=rf"{kind}-\d+.journal: this segment is missing"):
        Journal.open(tmp_path)


def test_a_file_that_is_no_segment_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    segments(tmp_path, "events")[0].write_bytes(b"")
    with pytest.raises(JournalError, match="this is no journal segment"):
        Journal.open(tmp_path)


def test_a_segment_that_never_got_its_name_is_removed(tmp_path: Path) -> None:
    written = write_run(tmp_path, 2)
    unfinished = tmp_path / "events-00000002.journal.partial"
    unfinished.write_bytes(b"half")
    opened = Journal.open(tmp_path)
    assert list(opened.events) == written
    assert not unfinished.exists()
    opened.journal.close()


def test_the_trail_of_a_running_hub_is_read_without_disturbing_it(tmp_path: Path) -> None:
    written = write_run(tmp_path, 3)
    journal = Journal.open(tmp_path).journal
    path = segments(tmp_path, "events")[0]
    with path.open("ab") as file:
        file.write(b"a write in progress")
    content = path.read_bytes()
    assert list(read_trail(tmp_path)) == written
    assert path.read_bytes() == content
    journal.close()


def test_a_trail_with_damage_anywhere_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    content = bytearray(segments(tmp_path, "events")[0].read_bytes())
    content[100] ^= 8
    segments(tmp_path, "events")[0].write_bytes(content)
    with pytest.raises(JournalCorrupt, match="checksum"):
        list(read_trail(tmp_path))
    with pytest.raises(JournalCorrupt, match="missing"):
        list(read_trail(tmp_path / ".."))
