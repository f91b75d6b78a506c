"""Wall time = computing + waiting by cause: made-up tracks, and what a role's recorder writes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_async.telemetry.accounting import (
    ADMISSION_CAUSES,
    COMPUTING,
    PARTS,
    PRECEDENCE,
    UNACCOUNTED,
    account,
    accounts,
    largest_wait,
    pieces,
    rl_accounts,
)
from slime_async.telemetry.clocks import ClockSample, clock_sample, offset_at
from slime_async.telemetry.intervals import Interval, difference, intersection, total, union
from slime_async.telemetry.spans import ProcessRole, Span, SpanRecorder, Track, read_tracks

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))))


def track(process: str, role: ProcessRole, *spans: tuple[str, int, int]) -> Track:
    return Track(process, role, [Span(process, name, start, end, {}) for name, start, end in spans])


ACTOR = track(
    "actor-0",
    "actor",
    ("starting", 0, 10),
    ("idle", 2, 20),
    ("episode", 20, 80),
    ("generate", 25, 40),
    ("weight_sync", 38, 50),
    ("generate", 50, 70),
    ("deliver", 60, 90),
    ("idle", 90, 100),
)
HUB = Track(
    "hub", "hub", [Span("hub", "gate", 15, 18, {"cause": "staleness"}), Span("hub", "gate", 92, 99, {"cause": "drain"})]
)


def test_each_instant_belongs_to_the_first_cause_that_covers_it() -> None:
    seconds = {part: round(s * 1e9) for part, s in account([ACTOR, HUB], "actor").seconds.items()}  # type: ignore[union-attr]
    assert seconds == {
        "computing": 15 + 20,
        "weight_sync": 10,  # [38, 40) was still computed
        "starting": 10,
        "environment": 5 + 10,
        "delivery": 10,  # [60, 80) belongs to the episodes that were open
        "admission_staleness": 3,
        "admission": 7 + 10,
    }


@given(INTERVALS, INTERVALS)
def test_a_difference_has_the_instants_of_the_left_side_alone(left: list[Interval], right: list[Interval]) -> None:
    rest = difference(left, right)
    assert rest == union(rest)
    assert intersection(rest, right) == []
    assert total(rest) + total(intersection(left, right)) == total(left)


SPANS = st.lists(
    st.tuples(
        st.sampled_from(["starting", "idle", "episode", "generate", "weight_sync", "deliver", "unheard-of"]),
        st.integers(0, 100),
        st.integers(1, 40),
    ).map(lambda span: (span[0], span[1], span[1] + span[2])),
    min_size=1,
)


@given(SPANS)
def test_whatever_was_recorded_the_parts_fill_a_life_without_overlap(spans: list[tuple[str, int, int]]) -> None:
    cut = pieces(track("a", "actor", *spans), HUB.spans)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(cut))
    assert (cut[0][0], cut[-1][1]) == (min(s for _, s, _ in spans), max(e for _, _, e in spans))
    side = account([track("a", "actor", *spans), HUB], "actor")
    assert side is not None
    assert sum(side.fractions.values()) == pytest.approx(1.0)
    assert side.seconds.keys() <= PARTS.keys()


def test_time_without_any_span_is_shown_as_unaccounted() -> None:
    side = account([track("learner", "learner", ("train", 0, 30), ("lease", 70, 100))], "learner")
    assert side is not None
    assert side.fractions == pytest.approx({COMPUTING: 0.3, "queue_empty": 0.3, UNACCOUNTED: 0.4})
    assert largest_wait(side) == ("queue_empty", pytest.approx(0.3))


def test_a_side_sums_its_processes_and_the_rl_phase_cuts_them() -> None:
    learner = track("learner", "learner", ("starting", 0, 40), ("lease", 40, 50), ("train", 50, 90), ("commit", 90, 95))
    second = track("actor-1", "actor", ("generate", 60, 200))
    assert accounts([learner, ACTOR, second])["actor"].wall_s == pytest.approx(240e-9)
    rl = rl_accounts([learner, ACTOR, second, HUB])
    assert rl["learner"].wall_s == pytest.approx(55e-9)
    assert rl["actor"].processes == 2
    assert rl["actor"].wall_s == pytest.approx((55 + 35) * 1e-9)
    assert rl_accounts([ACTOR]) == {}
    assert account([ACTOR], "learner") is None


def test_every_part_has_its_words() -> None:
    named = {part for rows in PRECEDENCE.values() for _, part in rows} | set(ADMISSION_CAUSES.values())
    assert named | {UNACCOUNTED} == PARTS.keys()


# ------------------------------------------------------------------------------------------------------------- clocks


def test_a_round_trip_gives_an_offset_and_how_wrong_it_may_be() -> None:
    assert clock_sample(1_000, 51_010, 1_020) == ClockSample(at_ns=1_010, offset_ns=50_000, error_ns=10)


def test_offsets_are_interpolated_between_measurements_and_noise_is_left_out() -> None:
    samples = [ClockSample(0, 1000, 10), ClockSample(100, 2000, 10), ClockSample(200, 5, 10)]
    assert [offset_at(samples, t) for t in (-50, 0, 50, 100, 150, 200, 999)] == [1000, 1000, 1500, 2000, 1000, 0, 0]
    assert offset_at([], 5) == 0


def test_spans_of_a_machine_whose_clock_is_wrong_come_back_in_the_hubs_time(tmp_path: Path) -> None:
    recorder = SpanRecorder(tmp_path / "far.jsonl", "far", "actor")
    now_ns = recorder.now_ns()
    recorder.align(ClockSample(now_ns, -5 * 10**9, 100))
    with recorder.span("generate"):
        pass
    recorder.close()
    [far] = read_tracks(tmp_path)
    assert (far.process, far.role) == ("far", "actor")
    assert abs(far.spans[0].start_ns - now_ns + 5 * 10**9) < 10**9


def test_bad_lines_are_told_and_skipped(tmp_path: Path) -> None:
    recorder = SpanRecorder(tmp_path / "x.jsonl", "x", "hub")
    recorder.add("gate", 1, 2, cause="staleness")
    recorder.close()
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"process": "x", "na\n[1]\n{"process": "x", "name": "ga')
    told: list[str] = []
    [read] = read_tracks(tmp_path, told.append)
    assert [span.name for span in read.spans] == ["gate"]
    assert len(told) == 2
    assert "line 3" in told[0]
