from __future__ import annotations

import math

import pytest

from slime_async.bench.intervals import Estimate, estimate, rate, ratio, same_distribution
from slime_async.bench.measure import requests_at_once
from slime_async.bench.windows import cut


def steps(period_s: float, count: int) -> list[dict[str, float]]:
    return [
        {"step": float(i), "time_s": (i + 1) * period_s, "sampled_tokens": 100.0, "batch_tokens": 120.0}
        for i in range(count)
    ]


def test_windows_begin_and_end_with_steps_and_follow_each_other() -> None:
    windows = cut(steps(3.0, 20), begin_s=0.0, warmup_s=5.0, windows=3, window_s=10.0, batch=8)
    assert [(w.start_s, w.end_s) for w in windows] == [(6.0, 15.0), (15.0, 27.0), (27.0, 36.0)]
    assert [w.samples for w in windows] == [24, 32, 24]
    assert windows[0].samples_per_s == pytest.approx(8 / 3)
    assert windows[0].batch_tokens == 360


def test_the_rate_does_not_depend_on_where_the_edges_fall() -> None:
    for warmup_s in (4.1, 5.0, 6.9):
        for window in cut(steps(3.0, 30), 0.0, warmup_s, 3, 10.0, 8):
            assert window.samples_per_s == pytest.approx(8 / 3)


def test_steps_longer_than_a_window_make_fewer_windows_never_empty_ones() -> None:
    windows = cut(steps(15.0, 6), 0.0, 5.0, 4, 10.0, 8)
    assert [w.steps for w in windows] == [1, 1]


def test_too_little_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="fewer than two windows"):
        cut(steps(50.0, 2), 0.0, 5.0, 3, 10.0, 8)


def test_requests_at_once_are_those_of_one_engine_within_the_windows() -> None:
    queue = [{"time_s": float(second), "running_requests": 10 * second} for second in range(6)]
    assert requests_at_once(queue, (2.0, 5.0), engines=2) == pytest.approx(15.0)
    assert requests_at_once([{"time_s": 3.0, "running": 4}], (2.0, 5.0), engines=2) is None


def test_an_interval_is_students() -> None:
    assert estimate([1.0, 2.0, 3.0]).half_width == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert math.isnan(estimate([1.0]).half_width)
    with pytest.raises(ValueError, match="nothing to average"):
        estimate([])


def test_a_rate_over_unequal_windows_counts_every_second_alike() -> None:
    together = rate([10.0, 60.0], [10.0, 20.0])
    assert together.mean == pytest.approx(70 / 30)
    assert together.half_width == pytest.approx(estimate([1.0, 3.0]).half_width)


def test_a_ratios_interval_joins_those_of_both() -> None:
    quotient = ratio(Estimate(20.0, 2.0), Estimate(10.0, 1.0))
    assert quotient.mean == pytest.approx(2.0)
    assert quotient.half_width == pytest.approx(2.0 * math.hypot(0.1, 0.1))


def test_the_two_sample_test_tells_distributions_apart() -> None:
    same = [i % 100 for i in range(500)]
    assert same_distribution(same, [(7 * i + 3) % 100 for i in range(400)]) > 0.5
    assert same_distribution(same, [i % 80 for i in range(400)]) < 1e-6
    assert same_distribution([], same) == 1.0
