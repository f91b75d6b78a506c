"""Evaluations beside training: begun on schedule, collected between steps, never waited for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from slime_async.config import Config
from slime_async.evaluation import EvaluationStatistics, interval, pass_at_k, wilson
from slime_async.learner.evaluations import ScheduledEvaluations
from slime_async.protocol import Evaluate, EvaluationResult, Message
from slime_async.telemetry.events import EventLog
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.metrics import is_documented
from slime_async.transport.errors import RemoteError


class OpenCalls:
    """A hub that answers when a test says so."""

    def __init__(self) -> None:
        self.asked: list[Evaluate] = []
        self.answers: list[Future[Message]] = []

    def begin(self, message: Message, timeout_s: float, *, retry: bool = False) -> Future[Message]:
        assert isinstance(message, Evaluate)
        assert retry, "a hub that is started again is asked again"
        assert timeout_s > message.wait_s
        self.asked.append(message)
        self.answers.append(Future())
        return self.answers[-1]


@pytest.fixture
def events(tmp_path: Path) -> Iterator[EventLog]:
    log = EventLog(tmp_path / "events.jsonl")
    yield log
    log.close()


def schedule(
    events: EventLog, hub: OpenCalls, *sources: str, interval: int | None = 10, start: int = 0
) -> ScheduledEvaluations:
    table: dict[str, Any] = {
        "task": {"evaluation": {name: {"factory": "a:b"} for name in sources or ("held-out",)}},
        "evaluation": {"interval_versions": interval, "tasks": 4, "samples": 2, "share": 0.25, "timeout_s": 9.0},
    }
    return ScheduledEvaluations(Config.model_validate(table), hub, events, clock=lambda: 0.0, start=start)


RESULT = EvaluationResult("x", (1.0, 0.0, 1.0, 1.0, 0.0), 3, (10, 12), (2, 2, 1, 0))


def test_what_is_due_is_asked_once_and_skipped_versions_are_made_up_for(events: EventLog) -> None:
    hub = OpenCalls()
    evaluations = schedule(events, hub)
    for version in (0, 5, 9, 10, 10, 11):
        evaluations.published(version)
    assert hub.asked == [Evaluate("version_10/held-out", "held-out", 4, 9.0, samples=2, share=0.25)]
    hub.answers[0].set_result(RESULT)
    evaluations.collect()
    evaluations.published(23)  # 20 was never the newest
    assert [message.name for message in hub.asked] == ["version_10/held-out", "version_23/held-out"]


@pytest.mark.parametrize(("start", "asked"), [(17, []), (20, ["version_20/held-out"])])
def test_a_learner_that_was_started_again_asks_for_what_is_due_at_its_version_alone(
    events: EventLog, start: int, asked: list[str]
) -> None:
    hub = OpenCalls()
    evaluations = schedule(events, hub, start=start)
    evaluations.published(start)
    assert [message.name for message in hub.asked] == asked
    evaluations.published(20)
    assert [message.name for message in hub.asked] == ["version_20/held-out"]


def test_results_are_collected_without_waiting_and_name_the_versions_that_answered(
    events: EventLog, tmp_path: Path
) -> None:
    hub = OpenCalls()
    evaluations = schedule(events, hub)
    evaluations.published(10)
    assert evaluations.collect() == {}, "not yet"
    hub.answers[0].set_result(RESULT)
    metrics = evaluations.collect()
    assert metrics["evaluation/held-out/accuracy"] == 3 / 8
    assert (metrics["evaluation/held-out/version_first"], metrics["evaluation/held-out/version_last"]) == (10, 12)
    assert all(is_documented(name) for name in metrics)
    (line,) = read_jsonl(tmp_path / "events.jsonl")
    assert (line["name"], line["source"], line["tasks"], line["samples"]) == ("version_10", "held-out", 4, 2)
    assert (line["version_first"], line["version"], line["pinned"], line["failed"]) == (10, 12, False, 3)
    assert evaluations.collect() == {}, "once"


def test_an_evaluation_that_still_runs_is_not_begun_again_and_others_go_on(events: EventLog) -> None:
    hub = OpenCalls()
    evaluations = schedule(events, hub, "easy", "hard")
    evaluations.published(10)
    hub.answers[0].set_result(RESULT)
    evaluations.collect()
    evaluations.published(20)
    assert [message.name for message in hub.asked] == ["version_10/easy", "version_10/hard", "version_20/easy"]


def test_a_failed_evaluation_is_no_failure_of_training(events: EventLog, tmp_path: Path) -> None:
    hub = OpenCalls()
    evaluations = schedule(events, hub)
    evaluations.published(10)
    hub.answers[0].set_exception(RemoteError("ValueError", "it did not finish within 9 s"))
    assert evaluations.collect() == {}
    assert list(read_jsonl(tmp_path / "events.jsonl")) == []
    evaluations.published(20)
    assert len(hub.asked) == 2


def test_the_end_waits_for_what_still_runs_and_not_for_ever(events: EventLog) -> None:
    hub = OpenCalls()
    evaluations = schedule(events, hub, "easy", "hard")
    evaluations.published(10)
    hub.answers[1].set_result(RESULT)
    assert "evaluation/hard/accuracy" in evaluations.finish(0.01)


def test_without_an_interval_nothing_is_asked(events: EventLog) -> None:
    hub = OpenCalls()
    evaluations = schedule(events, hub, interval=None)
    evaluations.published(100)
    assert hub.asked == []


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize(
    ("samples", "correct", "k", "wanted"),
    [
        (1, 1, 1, 1.0),
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),
        (4, 1, 4, 1.0),
        (4, 3, 2, 1.0),
        (4, 0, 4, 0.0),
        (10, 3, 5, 11 / 12),
    ],
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(
    samples: int, correct: int, k: int, wanted: float
) -> None:
    assert pass_at_k(samples, correct, k) == pytest.approx(wanted)


@pytest.mark.parametrize(("samples", "correct", "k"), [(2, 3, 1), (2, 1, 3), (2, 1, 0)])
def test_pass_at_k_of_impossible_numbers_is_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs 0 ≤ right"):
        pass_at_k(samples, correct, k)


def test_wilsons_interval_is_the_published_one() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_answers_to_one_task_do_not_count_as_independent() -> None:
    apart, together = interval([4, 0, 4, 0, 4, 0], 4, 6), interval([12, 12], 24, 48)
    assert apart[1] - apart[0] > 0.7, "six tasks say little, however often each is asked"
    assert together[1] - together[0] < 0.3
    assert interval([], 4, 0) == (0.0, 1.0)
    low, high = interval([4] * 5, 4, 5)
    assert low == pytest.approx(wilson(5, 5)[0])
    assert high == 1.0


def test_statistics_of_several_answers_per_task() -> None:
    statistics = EvaluationStatistics.of(RESULT, samples=2)
    assert statistics.accuracy == 3 / 8
    assert statistics.reward_mean == 3 / 5
    # right answers per task: 1, 2, 0, 0
    assert statistics.pass_at == {1: pytest.approx(3 / 8), 2: pytest.approx(2 / 4)}
    assert statistics.accuracy_low < 3 / 8 < statistics.accuracy_high


def test_statistics_of_one_answer_per_task_and_of_none_at_all() -> None:
    one = EvaluationStatistics.of(EvaluationResult("x", (1.0, 0.0), 1, (3,)), samples=1)
    assert (one.accuracy, one.pass_at) == (1 / 3, {1: pytest.approx(1 / 3)})
    none = EvaluationStatistics.of(EvaluationResult("x", (), 2, ()), samples=1)
    assert none.accuracy == 0.0
    assert math.isnan(none.reward_mean)
    assert EvaluationResult("x", (1.0,), 0, (3,)).pinned
    assert not RESULT.pinned
