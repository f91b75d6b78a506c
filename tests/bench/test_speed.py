from __future__ import annotations

import os
import time

import pytest

from slime_async.bench import speed
from slime_async.bench.speed import CoreSpeeds, times_as_fast

DEADLINE_S = 30.0


def test_the_speed_of_each_core_is_noted_while_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "INTERVAL_S", 0.001)
    cores, begun = sorted(os.sched_getaffinity(0)), time.time()
    with CoreSpeeds(cores) as speeds:
        while not all(speeds.between(begun, time.time(), [core]) for core in cores):
            assert time.time() < begun + DEADLINE_S
    ended = time.time()
    each = [speeds.between(begun, ended, [core]) for core in cores]
    assert speeds.between(begun, ended) == pytest.approx(sum(each) / len(each))
    assert speeds.between(ended + 1, ended + 2) == speeds.between(begun - 2, begun - 1) == 0.0
    assert os.sched_getaffinity(0) == set(cores)


def test_without_cores_nothing_is_known() -> None:
    with CoreSpeeds(()) as speeds:
        assert speeds.between(0.0, time.time()) == 0.0


def test_a_core_that_cannot_be_watched_is_told() -> None:
    with CoreSpeeds([1 << 14]) as speeds:
        pass
    with pytest.raises(RuntimeError, match="speed of the cores could not be watched"):
        speeds.between(0.0, time.time())


def test_what_is_unknown_changes_nothing() -> None:
    assert times_as_fast(3.0, 2.0) == 1.5
    assert times_as_fast(0.0, 2.0) == times_as_fast(3.0, 0.0) == 1.0
