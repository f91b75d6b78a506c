"""Spans of overlapping things, on a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from slime_async.telemetry import occupancy
from slime_async.telemetry.occupancy import Occupancy
from slime_async.telemetry.spans import PIECE_NS, SpanRecorder, process_start_ns, read_spans


class Clock:
    def __init__(self) -> None:
        self.now = 10**15

    def monotonic_ns(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(occupancy, "time", moved)
    return moved


def spans_of(directory: Path) -> list[tuple[str, int]]:
    return [(span.name, span.end_ns - span.start_ns) for span in read_spans(directory)]


def test_what_overlaps_is_one_span_and_nothing_at_all_another(tmp_path: Path, clock: Clock) -> None:
    recorder = SpanRecorder(tmp_path / "a.jsonl", "a")
    occupancy = Occupancy(recorder, "episode", "idle")
    clock.now += 5
    occupancy.enter()
    clock.now += 3
    with occupancy.inside():
        clock.now += 4
    occupancy.leave()
    clock.now += 7
    occupancy.close()
    recorder.close()
    assert spans_of(tmp_path) == [("idle", 5), ("episode", 7), ("idle", 7)]


def test_a_long_stretch_is_written_in_pieces(tmp_path: Path, clock: Clock) -> None:
    recorder = SpanRecorder(tmp_path / "a.jsonl", "a")
    occupancy = Occupancy(recorder, "episode")
    occupancy.enter()
    for _ in range(3):
        clock.now += PIECE_NS + 1
        occupancy.enter()
    recorder.close()
    assert spans_of(tmp_path) == [("episode", PIECE_NS + 1)] * 3


def test_leaving_what_was_not_entered_is_our_mistake(clock: Clock) -> None:
    with pytest.raises(AssertionError, match="nothing is in"):
        Occupancy(SpanRecorder(None, "a"), "episode").leave()


def test_a_process_knows_when_it_began() -> None:
    import time

    age_s = (time.monotonic_ns() - process_start_ns()) / 1e9
    assert 0 <= age_s < 3600
