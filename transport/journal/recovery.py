"""What a dead process left: cut where a write was cut off, refused where something that was written is gone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from slime_async.transport.journal.errors import JournalCorrupt
from slime_async.transport.journal.payloads import PayloadLog
from slime_async.transport.journal.records import Scan
from slime_async.transport.journal.segment import segment_path
from slime_async.transport.journal.trail import Position, Trail, TrailEntry

log = logging.getLogger(__name__)


def recover(
    trail: Trail, entries: Sequence[TrailEntry], trail_scan: Scan, payloads: PayloadLog, payload_scan: Scan | None
) -> tuple[Sequence[TrailEntry], int]:
    """Cut both logs to the newest state of which everything is there: its entries, and the bytes that were cut.

    A killed process leaves at most half a record at the end of one log. Without ``fsync``, a loss of power may also
    take payloads whose events are there: the state before these events is the newest one that is whole.
    Raises ``JournalCorrupt`` before anything is changed.
    """
    payload_end = payloads.end if payload_scan is None else Position(payloads.end.segment, payload_scan.end)
    trail_end = Position(trail.end.segment, trail_scan.end)
    reason = trail_scan.problem
    kept = entries
    for i, entry in enumerate(entries):
        if entry.needs.payloads > payload_end:
            _refuse_unless_power_was_lost(entry, payload_end, payloads, trail)
            trail_end = Position(trail.end.segment, entry.offset)
            reason = f"the payloads of these events are lost: {payloads.path} ends at byte {payload_end.offset}"
            kept = entries[:i]
            break
    cut_bytes = trail.end.offset - trail_end.offset + payloads.end.offset - payload_end.offset
    if trail.end > trail_end:
        _tell(trail.path, trail.end.offset - trail_end.offset, trail_end.offset, reason)
        trail.cut(trail_end)
    if payload_scan is not None and payloads.end > payload_end:
        _tell(payloads.path, payloads.end.offset - payload_end.offset, payload_end.offset, payload_scan.problem)
        payloads.cut(payload_end)
    return kept, cut_bytes


def _refuse_unless_power_was_lost(entry: TrailEntry, payload_end: Position, payloads: PayloadLog, trail: Trail) -> None:
    wanted = entry.needs.payloads
    if wanted.segment > payload_end.segment:
        missing = segment_path(trail.path.parent, "payloads", wanted.segment)
        raise JournalCorrupt(missing, "this segment is missing")
    if entry.needs.synced:
        problem = (
            f"payloads end here, those of event record {trail.path.name} at byte {entry.offset} at {wanted.offset}"
        )
        raise JournalCorrupt(payloads.path, problem, payload_end.offset)


def _tell(path: Path, size: int, offset: int, reason: str) -> None:
    log.warning("%s: cut %d bytes from byte %d on, a write that was not finished (%s)", path, size, offset, reason)
