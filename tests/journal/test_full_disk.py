"""Writes that the system refuses, for real: a full disk, a file that may not grow, an fsync that fails."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slime_async.queue.events import Committed
from slime_async.transport.journal import Journal, JournalError, JournalWriter
from tests.journal.examples import accepted, append, frames, key, read_all, segments

LARGE = 300_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, timeout=30, check=False).returncode:
        pytest.skip("only root may mount a small file system; the other tests here need none")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], timeout=30, check=True)


@contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond it: the kernel writes what fits, then fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(journal: Journal) -> tuple[int, JournalError]:
    """Append until it is refused; how many fitted."""
    for number in range(1000):
        try:
            append(journal, number, LARGE)
        except JournalError as error:
            return number, error
    raise AssertionError("the disk never filled up")


def test_a_full_disk_is_told_and_the_journal_stays_whole(small_disk: Path) -> None:
    directory = small_disk / "journal"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1 << 20))
    journal = Journal.open(directory).journal
    count, error = fill(journal)
    assert 2 <= count <= 10
    assert error.errno == errno.ENOSPC
    assert error.path == segments(directory, "payloads")[0]
    assert "writing payloads failed (No space left on device): make room on this disk" in str(error)
    read_all(journal, range(count), LARGE)
    filler.unlink()
    append(journal, count, LARGE)
    journal.close()
    opened = Journal.open(directory)
    assert opened.truncated_bytes == 0
    assert list(opened.events) == [accepted(number) for number in range(count + 1)]
    read_all(opened.journal, range(count + 1), LARGE)
    opened.journal.close()


def test_events_that_do_not_fit_take_their_payloads_back(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path).journal
    append(journal, 0)
    journal.append([Committed(version) for version in range(100)], {})
    events, payloads = segments(tmp_path, "events")[0], segments(tmp_path, "payloads")[0]
    before = events.read_bytes(), payloads.read_bytes()
    with files_end_at(len(before[0]) + 50), pytest.raises(JournalError, match="writing events failed") as caught:
        journal.append([accepted(1)], {key(1): frames(1, 20)})
    assert caught.value.errno == errno.EFBIG
    assert (events.read_bytes(), payloads.read_bytes()) == before
    append(journal, 1)
    read_all(journal, [0, 1])
    journal.close()


def test_a_write_that_is_cut_short_everywhere_leaves_nothing_behind(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path).journal
    append(journal, 0)
    size = segments(tmp_path, "payloads")[0].stat().st_size
    for extra in range(0, 200, 7):
        with files_end_at(size + extra), pytest.raises(JournalError):
            journal.append([accepted(1)], {key(1): frames(1, 400)})
        assert segments(tmp_path, "payloads")[0].stat().st_size == size
    journal.close()
    opened = Journal.open(tmp_path)
    assert opened.events == (accepted(0),)
    assert opened.truncated_bytes == 0
    opened.journal.close()


def test_after_a_failed_fsync_nothing_more_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path, fsync=True).journal
    append(journal, 0)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(JournalError, match="see that the disk is mounted, writable and healthy"):
            append(journal, 1)
    with pytest.raises(JournalError, match="fsync failed"):
        append(journal, 1)
    journal.close()
    opened = Journal.open(tmp_path)
    assert opened.events == (accepted(0),)
    opened.journal.close()


def test_a_full_disk_fails_everybody_who_waits_and_whoever_watches(small_disk: Path) -> None:
    async def play() -> int:
        writer = JournalWriter(Journal.open(small_disk / "journal").journal)
        watching = asyncio.create_task(writer.watch())
        appends = [writer.append([accepted(n)], {key(n): frames(n, LARGE)}) for n in range(30)]
        results = await asyncio.gather(*appends, return_exceptions=True)
        with pytest.raises(JournalError, match="No space left"):
            await watching
        with pytest.raises(JournalError, match="No space left"):
            await writer.append([Committed(0)], {})
        with pytest.raises(JournalError, match="No space left"):
            await writer.room()
        with pytest.raises(JournalError, match="No space left"):
            await writer.close()
        written = sum(not isinstance(result, BaseException) for result in results)
        assert all(isinstance(result, JournalError) for result in results[written:])
        return written

    written = asyncio.run(asyncio.wait_for(play(), 60))
    opened = Journal.open(small_disk / "journal")
    assert list(opened.events) == [accepted(number) for number in range(len(opened.events))]
    assert len(opened.events) >= written
    opened.journal.close()
