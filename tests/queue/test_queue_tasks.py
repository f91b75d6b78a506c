"""The order of tasks."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_async.config.schema import Config, RunConfig, SourceConfig, TaskConfig
from slime_async.queue import TaskStream
from slime_async.queue.shuffle import permuted
from slime_async.trajectory import TaskRef


def take(stream: TaskStream, count: int) -> list[TaskRef]:
    taken = []
    for _ in range(count):
        task = stream.peek()
        assert task is not None
        stream.advance(task.source)
        taken.append(task)
    return taken


@given(size=st.integers(1, 300), seed=st.integers(0, 1 << 62), epoch=st.integers(0, 5))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = [permuted(i, size, seed=seed, source="s", epoch=epoch) for i in range(size)]
    assert sorted(order) == list(range(size))


def test_orders_differ_between_epochs_seeds_and_sources() -> None:
    def order(seed: int, source: str, epoch: int) -> tuple[int, ...]:
        return tuple(permuted(i, 100, seed=seed, source=source, epoch=epoch) for i in range(100))

    assert len({order(0, "a", 0), order(0, "a", 1), order(1, "a", 0), order(0, "b", 0), tuple(range(100))}) == 5


def test_the_permutation_looks_random() -> None:
    size = 1000
    order = [permuted(i, size, seed=3, source="s", epoch=0) for i in range(size)]
    displaced = sum(abs(i - j) for i, j in enumerate(order)) / size
    assert 0.3 * size < displaced < 0.37 * size  # a third of the size, for a uniform permutation
    assert sum(i == j for i, j in enumerate(order)) < 10
    ascents = sum(a < b for a, b in itertools.pairwise(order))
    assert 450 < ascents < 550


def test_ten_million_tasks_need_no_list() -> None:
    stream = TaskStream({"big": 1.0}, seed=5)
    stream.declare_sources({"big": 10_000_000})
    indices = [task.index for task in take(stream, 1000)]
    assert len(set(indices)) == 1000
    assert max(indices) > 9_000_000


def test_shares_follow_the_weights_in_every_prefix() -> None:
    stream = TaskStream({"a": 5.0, "b": 3.0, "c": 2.0})
    stream.declare_sources({"a": 7, "b": 100, "c": 100})
    counts: Counter[str] = Counter()
    for position, task in enumerate(take(stream, 200), start=1):
        counts[task.source] += 1
        for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
            assert abs(counts[name] - weight * position) < 1


def test_serials_count_tasks_and_epochs_count_passes() -> None:
    stream = TaskStream({"a": 1.0}, shuffle=False)
    stream.declare_sources({"a": 2})
    assert take(stream, 5) == [TaskRef(i, "a", i % 2, i // 2) for i in range(5)]


def test_a_finite_stream_gives_each_task_once_per_epoch() -> None:
    stream = TaskStream({"a": 1.0, "b": 9.0}, epochs=2)
    stream.declare_sources({"a": 3, "b": 5, "held-out": 9})
    given_out = Counter((task.source, task.index) for task in take(stream, 16))
    assert set(given_out.values()) == {2}
    assert len(given_out) == 8
    assert stream.exhausted
    assert stream.peek() is None


def test_before_the_declaration_there_are_no_tasks_but_it_is_not_exhausted() -> None:
    stream = TaskStream({"a": 1.0})
    assert stream.peek() is None
    assert not stream.exhausted


@given(cut=st.integers(0, 40))
def test_a_stream_carries_on_from_its_state(cut: int) -> None:
    def fresh() -> TaskStream:
        return TaskStream({"a": 1.0, "b": 2.5}, seed=9, epochs=4)

    whole, first, second = fresh(), fresh(), fresh()
    for stream in (whole, first):
        stream.declare_sources({"a": 11, "b": 13})
    wanted = take(whole, 60)
    assert take(first, cut) == wanted[:cut]
    second.restore(first.state())
    assert take(second, 60 - cut) == wanted[cut:]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"a": 4}, "source 'a' holds 4 tasks here and 3 on the actors before"),
        ({"a": 3, "x": 1}, "source 'x' holds 1 tasks here and 0"),
        ({"x": 1}, r"training sources \['a'\] are not among those declared"),
        ({"a": 0}, r"sources \['a'\] hold no tasks"),
    ],
)
def test_actors_that_disagree_about_sources_are_refused(sizes: dict[str, int], message: str) -> None:
    stream = TaskStream({"a": 1.0})
    stream.declare_sources({"a": 3})
    stream.declare_sources({"a": 3})
    with pytest.raises(ValueError, match=message):
        stream.declare_sources(sizes)


def test_a_weight_must_be_positive() -> None:
    with pytest.raises(ValueError, match="source 'a' has weight 0"):
        TaskStream({"a": 0.0})


def test_a_stream_comes_from_the_configuration() -> None:
    train = {"a": SourceConfig(factory="m:a", weight=2.0), "b": SourceConfig(factory="m:b")}
    config = Config(run=RunConfig(seed=4), task=TaskConfig(train=train, epochs=1, shuffle=False))
    stream = TaskStream.from_config(config)
    stream.declare_sources({"a": 1, "b": 1})
    assert [task.source for task in take(stream, 2)] == ["a", "b"]
    assert stream.exhausted
