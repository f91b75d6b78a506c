"""Small runs to journal: events as the queue emits them, payloads that say which key they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slime_async.queue import Event, TrajectoryMeta
from slime_async.queue.events import Accepted, BatchShape, Committed
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.journal import Journal

FRAMES = 3


def key(number: int) -> TrajectoryKey:
    return TrajectoryKey(number // 4, number % 4)


def accepted(number: int, size_bytes: int = 100) -> Accepted:
    return Accepted(TrajectoryMeta(key(number), 1, 12, 8, size_bytes, ((0, 3), (1, 5)), 0.5), 1)


def frames(number: int, size: int = 30) -> list[bytes]:
    """Three, of different sizes; one is empty."""
    pattern = number.to_bytes(4, "little") * (size // 4 + 1)
    return [pattern[:size], b"", pattern[: size // 2]]


def append(journal: Journal, number: int, size: int = 30) -> None:
    journal.append([accepted(number)], {key(number): frames(number, size)})


def write_run(directory: Path, count: int, size: int = 30) -> list[Event]:
    """A journal of ``count`` trajectories, closed again; its events."""
    with_shape: list[Event] = [BatchShape(4, 1)]
    journal = Journal.open(directory).journal
    journal.append(with_shape, {})
    for number in range(count):
        append(journal, number, size)
    journal.append([Committed(0)], {})
    journal.close()
    return [*with_shape, *(accepted(number) for number in range(count)), Committed(0)]


def read_all(journal: Journal, numbers: Sequence[int], size: int = 30) -> None:
    """Every payload is there and is its own."""
    for number in numbers:
        assert [bytes(frame) for frame in journal.read(key(number))] == frames(number, size)


def segments(directory: Path, kind: str) -> list[Path]:
    return sorted(directory.glob(f"{kind}-*.journal"))
