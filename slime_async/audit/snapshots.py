"""A snapshot in the trail must say what the events before it add up to: nothing is lost in compacting a journal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slime_async.queue.events import Snapshot
from slime_async.trajectory import TrajectoryKey

if TYPE_CHECKING:
    from slime_async.audit.book import Book


def check_snapshot(book: Book, snapshot: Snapshot) -> Iterator[tuple[str, list[TrajectoryKey]]]:
    """Every difference, with the trajectories concerned."""
    held = {accepted.meta.key for _, samples, _ in snapshot.groups for accepted in samples}
    owed = _owed(book)
    if lost := sorted(owed - held):
        yield "lost: accepted, neither durable nor dropped, and missing from a snapshot", lost
    if made_up := sorted(held - owed):
        yield "in a snapshot, but not accepted before it, or done with", made_up
    for task, samples, rewards in snapshot.groups:
        if task.serial in book.groups and book.groups[task.serial].rewards != rewards:
            yield "a snapshot and the events before it disagree about rewards", [a.meta.key for a in samples]
    said = {leased.train_version: (leased.groups, state) for leased, state, _ in snapshot.batches}
    known = {v: (batch.groups, batch.state) for v, batch in book.batches.items() if v >= book.durable}
    for version in sorted(said.keys() | known.keys()):
        if said.get(version) != known.get(version):
            groups = {serial for side in (said, known) if version in side for serial in side[version][0]}
            yield f"a snapshot and the events before it disagree about batch {version}", sorted(book.keys_of(groups))
    counts = {"trained": book.trained, "durable": book.durable}
    for name, count in counts.items():
        if getattr(snapshot, name) != count:
            yield f"a snapshot has {getattr(snapshot, name)} batches {name}, the events before it {count}", []
    if snapshot.totals.get("accepted", 0) != book.accepted:
        yield f"a snapshot counts {snapshot.totals.get('accepted', 0)} accepted, the events {book.accepted}", []


def _owed(book: Book) -> set[TrajectoryKey]:
    """Accepted trajectories that are neither durable nor dropped."""
    return {
        key
        for group in book.groups.values()
        if group.dropped is None and (group.batch is None or group.batch >= book.durable)
        for key in group.keys
    }
