"""Kill a process that appends, releases and compacts, again and again, and see each time what is left.

    python -m tests.journal.killed_hub DIRECTORY ROUNDS

Each round is a fork, so that it costs milliseconds. The child says through a pipe which appends have returned.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from slime_async.queue import Event, Snapshot
from slime_async.queue.events import BatchShape
from slime_async.transport.journal import Journal, read_trail
from tests.journal.examples import accepted, frames, key

KEPT = 12
"""The newest payloads that are kept"""
SIZES = (10, 3_000, 200_000, 1_000_000)
"""Payloads have half as much again; the largest are written and summed up at once"""
SEGMENT_BYTES = 4 << 20
DEADLINE_S = 60.0


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def snapshot(accepted_so_far: int) -> Snapshot:
    """All that these events add up to is how many there were."""
    return Snapshot(BatchShape(4, 1), 0, False, 0, 0, 1, -1, 0, {}, (), (), (), (), {"accepted": accepted_so_far})


def append_until_killed(directory: Path, first: int, promises: int) -> None:
    journal = Journal.open(directory, segment_bytes=SEGMENT_BYTES, events_bytes=4096).journal
    for number in range(first, sys.maxsize):
        journal.append([accepted(number)], {key(number): frames(number, size_of(number))})
        os.write(promises, b"%d\n" % number)
        journal.release([key(number - KEPT)] if number >= KEPT else [])
        journal.maybe_compact(partial(snapshot, number + 1))


def run_and_kill(directory: Path, first: int, appends: int, pause_s: float) -> int:
    """Kill it ``pause_s`` after ``appends`` have returned; the last number that had."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            append_until_killed(directory, first, writing)
        finally:
            os._exit(1)
    os.close(writing)
    promised, deadline = b"", time.monotonic() + DEADLINE_S
    while promised.count(b"\n") < appends:
        ready, _, _ = select.select([reading], [], [], deadline - time.monotonic())
        assert ready, f"fewer than {appends} appends within {DEADLINE_S} s"
        chunk = os.read(reading, 65536)
        assert chunk, "the process died by itself"
        promised += chunk
    time.sleep(pause_s)  # only to vary where the kill hits
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while chunk := os.read(reading, 65536):
        promised += chunk
    os.close(reading)
    return int(promised.split()[-1])


def accepted_by(events: Iterable[Event]) -> int:
    """Checks that the events are consecutive; how many trajectories they accept."""
    count = 0
    for event in events:
        if isinstance(event, Snapshot):
            count = event.totals["accepted"]
        else:
            assert event == accepted(count)
            count += 1
    return count


def main(directory: Path, rounds: int) -> None:
    rng = random.Random(1)
    first, cut = 0, 0
    for _ in range(rounds):
        promised = run_and_kill(directory, first, rng.randint(1, 40), rng.random() / 50)
        opened = Journal.open(directory, segment_bytes=SEGMENT_BYTES)
        cut += opened.truncated_bytes > 0
        first = accepted_by(opened.events)
        assert first in (promised + 1, promised + 2), "one append may have been written without having returned"
        needed = range(max(0, first - KEPT), first)
        opened.journal.retain([key(number) for number in needed])
        for number in needed:
            assert [bytes(frame) for frame in opened.journal.read(key(number))] == frames(number, size_of(number))
        assert opened.journal.statistics.payload_bytes <= 8 * SEGMENT_BYTES
        opened.journal.close()
    assert accepted_by(read_trail(directory)) == first
    print(f"{rounds} kills, {first} trajectories, {cut} torn tails")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
