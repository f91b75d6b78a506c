"""Interval arithmetic, spans on disk, and the overlap of generation and training, against brute force."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_async.telemetry.intervals import Interval, intersection, total, union
from slime_async.telemetry.overlap import overlap_fraction, overlap_of_run, rl_phase
from slime_async.telemetry.spans import Span, SpanRecorder, read_spans

INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))))


def instants(intervals: list[Interval]) -> set[int]:
    return {instant for start, end in intervals for instant in range(start, end)}


@given(INTERVALS)
def test_a_union_covers_the_same_instants_with_sorted_disjoint_pieces(intervals: list[Interval]) -> None:
    merged = union(intervals)
    assert instants(merged) == instants(intervals)
    assert all(start < end for start, end in merged)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(merged)), "pieces that touch are one"
    assert total(intervals) == len(instants(intervals))


@given(INTERVALS, INTERVALS)
def test_an_intersection_has_the_instants_of_both_sides(left: list[Interval], right: list[Interval]) -> None:
    common = intersection(left, right)
    assert instants(common) == instants(left) & instants(right)
    assert common == union(common)
    assert common == intersection(right, left)


@given(INTERVALS, INTERVALS)
def test_the_overlap_is_a_fraction_of_the_smaller_side(left: list[Interval], right: list[Interval]) -> None:
    fraction = overlap_fraction(left, right)
    a, b = instants(left), instants(right)
    wanted = len(a & b) / min(len(a), len(b)) if a and b else None
    assert fraction == wanted


def test_an_interval_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3, 2\) ends before"):
        union([(3, 2)])


def span(process: str, name: str, start: int, end: int) -> Span:
    return Span(process, name, start, end, {})


RUN = [
    span("actor-0", "generate", 0, 50),  # evaluation, before the first lease
    span("learner", "lease", 60, 100),
    span("actor-0", "generate", 60, 100),
    span("actor-1", "generate", 90, 130),
    span("learner", "train", 100, 140),
    span("learner", "commit", 140, 150),
    span("learner", "lease", 150, 151),
    span("learner", "train", 151, 171),
    span("actor-0", "generate", 160, 400),  # and on into the evaluation after the last commit
    span("learner", "commit", 171, 180),
    span("learner", "train", 300, 340),  # a control, trained after RL
]


def test_only_the_rl_phase_counts_in_the_overlap() -> None:
    assert rl_phase(RUN) == (60, 180)
    # training 40 + 20; generating [60, 130) and [160, 180) = 90; both [100, 130) and [160, 171)
    assert overlap_of_run(RUN) == (30 + 11) / 60


def test_a_run_without_leases_or_without_training_has_no_overlap() -> None:
    assert overlap_of_run([]) is None
    assert overlap_of_run([s for s in RUN if s.name != "lease"]) is None
    assert overlap_of_run([s for s in RUN if s.name != "train"]) is None


def test_recorded_spans_come_back_in_wall_time(tmp_path: Path) -> None:
    before_ns = time.time_ns()
    recorder = SpanRecorder(tmp_path / "learner.jsonl", "learner")
    with recorder.span("train", step=3), pytest.raises(KeyError), recorder.span("broken"):
        raise KeyError("a span ends with its exception")
    start_ns = time.monotonic_ns()
    recorder.add("late", start_ns + 5, start_ns + 25, tokens=7)
    recorder.close()
    [train, broken, late] = read_spans(tmp_path)
    assert (train.process, train.name, train.args) == ("learner", "train", {"step": 3})
    assert train.start_ns <= broken.start_ns <= broken.end_ns <= train.end_ns <= late.start_ns
    assert (late.name, late.end_ns - late.start_ns, late.args) == ("late", 20, {"tokens": 7})
    slack_ns = 60 * 10**9  # wall clocks may be set meanwhile
    assert abs(train.start_ns - before_ns) < slack_ns


def test_a_span_cannot_end_before_it_starts(tmp_path: Path) -> None:
    recorder = SpanRecorder(tmp_path / "x.jsonl", "x")
    with pytest.raises(ValueError, match="'train' ends 1 ns before it starts"):
        recorder.add("train", 2, 1)
    recorder.close()


def test_spans_survive_kill_9(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from slime_async.telemetry.spans import SpanRecorder\n"
        "SpanRecorder(pathlib.Path(sys.argv[1]), 'actor-0').add('generate', 1, 2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.jsonl")], timeout=60, check=False)
    assert [s.name for s in read_spans(tmp_path)] == ["generate"]
