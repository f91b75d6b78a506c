"""An audit that finds nothing proves nothing until it has found each thing that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from slime_async.audit import AuditReport, audit
from slime_async.queue import Event, Snapshot, TaskStream, TrajectoryQueue
from slime_async.queue.events import (
    Committed,
    GroupDropped,
    GroupJudged,
    LearnerJoined,
    Leased,
    MadeDurable,
    WeightsPublished,
)
from slime_async.queue.limits import QueueLimits
from tests.audit.runs import accepted, batch, group, honest_metrics, honest_run, metrics_line, opened


def violations(events: list[Event], metrics: list[dict[str, Any]] | None = None, finished: bool = True) -> list[str]:
    report = audit(events, honest_metrics() if metrics is None else metrics, finished)
    assert report.clean == (not report.violations)
    return [str(violation) for violation in report.violations]


def changed(change: Callable[[list[Event]], object]) -> list[Event]:
    run = honest_run()
    change(run)
    return run


def queue_state(run: list[Event]) -> Snapshot:
    """What the queue itself makes of these events."""
    limits = QueueLimits(
        group_size=2, groups_per_batch=2, max_staleness=1, on_stale="mask", queue_trajectories=100,
        queue_bytes=1 << 20, max_trajectory_bytes=1000, max_attempts=1, drop_equal_rewards=False,
    )  # fmt: skip
    return TrajectoryQueue.replay(limits, TaskStream({"sums": 1.0}, shuffle=False), run).state()


def test_an_honest_run_is_clean_and_its_counts_add_up() -> None:
    report = audit(honest_run(), honest_metrics(), finished=False)
    assert report == AuditReport(
        accepted=15, trained=12, masked=0, dropped={"stale": 2}, queued=1, leased=0, to_retrain=0, batches=3,
        durable_batches=1, trained_again=0, rollbacks=0, steps=3, finished=False, violations=(),
    )  # fmt: skip
    text = "\n".join(report.lines())
    assert "accepted                   15 trajectories" in text
    assert "trained once             12 in 3 batches, 1 durable" in text
    assert "dropped                   2 (2 stale)" in text
    assert text.endswith("clean: nothing lost, nothing twice so far (the run has not finished)")


def test_trajectories_without_weight_in_the_loss_are_counted_apart() -> None:
    lines = honest_metrics()
    lines[1]["trajectories"] = 3.0
    report = audit(honest_run(), lines, finished=True)
    assert report.masked == 1
    assert "    of them                 1 without weight" in "\n".join(report.lines())


def test_what_a_lost_learner_trained_is_trained_once_in_the_final_lineage() -> None:
    run = [*honest_run(), LearnerJoined(2, 1)]
    report = audit(run, honest_metrics(), finished=False)
    assert (report.clean, report.trained, report.to_retrain, report.rollbacks) == (True, 4, 8, 1)
    run += [*batch(1, 2, 4, incarnation=2), *batch(2, 5, 6, incarnation=2)]
    report = audit(run, [*honest_metrics(), metrics_line(1, 2, 4), metrics_line(2, 5, 6)], finished=True)
    assert (report.clean, report.trained, report.to_retrain, report.trained_again) == (True, 12, 0, 2)


def test_a_batch_that_was_only_leased_returns_to_the_queue_with_its_learner() -> None:
    run = [*honest_run(), *group(8), *group(9), Leased(1, 3, (8, 9)), LearnerJoined(2, 3), *group(10)]
    run += batch(3, 9, 10, incarnation=2)
    report = audit(run, [*honest_metrics(), metrics_line(3, 9, 10)], finished=True)
    assert report.clean
    assert (report.trained, report.queued) == (16, 3)


def test_snapshots_of_the_queue_itself_agree() -> None:
    run = honest_run()
    for at in range(len(run), 0, -1):
        run.insert(at, queue_state(run[:at]))
    assert violations(run) == []


def judged_run() -> list[Event]:
    """The honest run, and one more batch, of groups that a judge had its say on."""
    verdicts: list[Event] = [GroupJudged(8, (5.0, 6.0)), GroupJudged(9, (0.0, 1.0)), GroupDropped(9, "filtered")]
    groups = [*group(8), *group(9), *group(10), *verdicts, GroupJudged(10, (1.0, 1.0))]
    return [*honest_run(), *groups, *batch(3, 8, 10)]


def test_a_judges_rewards_are_those_that_the_metrics_must_have() -> None:
    line = {**metrics_line(3, 8, 10), "reward_mean": 13.0 / 4}
    report = audit(judged_run(), [*honest_metrics(), line], finished=True)
    assert (report.violations, dict(report.dropped), report.trained) == ((), {"stale": 2, "filtered": 2}, 16)
    text = violations(judged_run(), [*honest_metrics(), metrics_line(3, 8, 10)])
    assert text[0].startswith("step 3 of the metrics is not batch 3: mean reward 9.125000 against 3.250000")


def test_snapshots_keep_a_judges_rewards() -> None:
    run = judged_run()
    for at in range(len(run), len(honest_run()), -1):
        run.insert(at, queue_state(run[:at]))
    assert violations(run, finished=False) == []


VIOLATIONS: dict[str, tuple[Callable[[list[Event]], object], str]] = {
    "lost in a snapshot": (
        lambda run: run.append(queue_state([event for event in run if event != accepted(7, 1)])),
        "lost: accepted, neither durable nor dropped, and missing from a snapshot: (7, 1)",
    ),
    "made up in a snapshot": (
        lambda run: run.append(queue_state([*run, accepted(7, 0)])),
        "in a snapshot, but not accepted before it, or done with: (7, 0)",
    ),
    "a snapshot's batch is another": (
        lambda run: run.append(queue_state([*run[:-5], *batch(2, 6, 5), opened(7), accepted(7, 1)])),
        "a snapshot and the events before it disagree about batch 2",
    ),
    "trained twice": (
        lambda run: run.extend([*group(8), *batch(3, 8, 0)]),
        "trained twice, in batch 0 and in batch 3: (0, 0), (0, 1)",
    ),
    "dropped, then trained": (
        lambda run: run.extend([*group(8), *batch(3, 8, 3)]),
        "dropped (stale), then trained in batch 3: (3, 0), (3, 1)",
    ),
    "trained, then dropped": (
        lambda run: run.append(GroupDropped(5, "failed")),
        "dropped (failed) when already in batch 2: (5, 0), (5, 1)",
    ),
    "judged twice": (
        lambda run: run.extend([*group(8), GroupJudged(8, (0.0, 1.0)), GroupJudged(8, (1.0, 0.0))]),
        "judged when already judged: (8, 0), (8, 1)",
    ),
    "judged too late": (
        lambda run: run.append(GroupJudged(5, (0.0, 1.0))),
        "judged when already in batch 2: (5, 0), (5, 1)",
    ),
    "judged in part": (
        lambda run: run.append(GroupJudged(7, (0.0, 1.0))),
        "judged with 2 rewards for 1 samples: (7, 1)",
    ),
    "judged out of nowhere": (
        lambda run: run.append(GroupJudged(30, (0.0, 1.0))),
        "group 30 was judged, but never opened",
    ),
    "a snapshot's rewards are others": (
        lambda run: run.extend(
            [*group(8), GroupJudged(8, (0.0, 1.0)), queue_state([*run, *group(8), GroupJudged(8, (1.0, 0.0))])]
        ),
        "a snapshot and the events before it disagree about rewards: (8, 0), (8, 1)",
    ),
    "unknown reason": (
        lambda run: run.append(GroupDropped(7, "bored")),  # type: ignore[arg-type]
        "dropped for 'bored', which is none of equal_rewards, failed, filtered, stale: (7, 1)",
    ),
    "accepted twice": (lambda run: run.append(accepted(7, 1)), "accepted twice: (7, 1)"),
    "accepted after training": (
        lambda run: run.append(accepted(2, 0)),
        "accepted when its group was already in batch 1: (2, 0)",
    ),
    "accepted out of nowhere": (
        lambda run: run.append(accepted(30, 0)),
        "accepted for a group that was never opened: (30, 0)",
    ),
    "incomplete group": (
        lambda run: run.extend([*group(8), *batch(3, 7, 8)]),
        "batch 3 trains a group without these samples, which were never accepted: (7, 0)",
    ),
    "too small a batch": (lambda run: run.extend([*group(8), *batch(3, 8)]), "batch 3 has 1 groups, not 2"),
    "committed twice": (
        lambda run: run.append(Committed(2)),
        "batch 2 was committed, but already trained: (5, 0), (5, 1), (6, 0), (6, 1)",
    ),
    "never leased": (lambda run: run.append(Committed(3)), "batch 3 was committed, but never leased"),
    "another composition": (
        lambda run: run.extend([LearnerJoined(2, 2), Leased(2, 2, (5, 7))]),
        "batch 2 is trained again with other groups than before: (6, 0), (6, 1), (7, 1)",
    ),
    "back behind a checkpoint": (
        lambda run: run.append(LearnerJoined(2, 0)),
        "learner 2 began from version 0, which is not between 1 (durable) and 3 (trained)",
    ),
    "a lost learner goes on": (
        lambda run: run.extend([LearnerJoined(2, 3), *group(8), *group(9), *batch(3, 8, 9, incarnation=1)]),
        "batch 3 went to learner 1, the present one is 2",
    ),
    "weights of nothing": (
        lambda run: run.append(WeightsPublished(9)),
        "version 9 was published, but only 3 batches are trained",
    ),
    "durable before trained": (
        lambda run: run.append(MadeDurable(4)),
        "version 4 was made durable, but only 3 batches are trained",
    ),
    "no beginning": (
        lambda run: run.insert(0, queue_state(run[:1])),
        "the trail begins with a snapshot: what came before it is gone",
    ),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_every_violation_is_found_and_named(name: str) -> None:
    change, wanted = VIOLATIONS[name]
    found = violations(changed(change), finished=False)
    assert any(text.startswith(wanted) for text in found), found


def test_a_missing_step_is_named_with_its_trajectories() -> None:
    lines = honest_metrics()
    assert violations(honest_run(), [lines[0], lines[2]], finished=False) == [
        "batch 1 was committed, but the metrics have no step 1: (2, 0), (2, 1), (4, 0), (4, 1)"
    ]
    assert violations(honest_run(), lines[:2], finished=False) == []
    assert len(violations(honest_run(), lines[:2], finished=True)) == 1


def test_a_step_that_trained_something_else_is_named() -> None:
    lines = honest_metrics()
    lines[1] = metrics_line(1, 2, 5)
    assert violations(honest_run(), lines) == [
        "step 1 of the metrics is not batch 1: 54 sampled tokens against 52: (2, 0), (2, 1), (4, 0), (4, 1)"
    ]
    lines[1] = {**metrics_line(1, 2, 4), "reward_mean": 3.0}
    assert violations(honest_run(), lines)[0].startswith("step 1 of the metrics is not batch 1: mean reward 3.000000")
    del lines[1]["reward_mean"]
    assert "lacks reward_mean" in violations(honest_run(), lines)[0]


def test_a_step_that_was_never_committed_is_named() -> None:
    lines = [*honest_metrics(), metrics_line(3, 7)]
    assert violations(honest_run(), lines) == ["the metrics have step 3, but batch 3 was never committed"]


def test_a_report_that_is_not_clean_says_so_and_shortens_long_lists() -> None:
    run = [*honest_run(), Leased(1, 3, tuple(range(7)))]
    text = "\n".join(audit(run, honest_metrics(), finished=True).lines())
    assert "NOT CLEAN: 8 violations\n  batch 3 has 7 groups, not 2\n  trained twice, in batch 0" in text
    many = [event for serial in range(10, 30) for event in group(serial)]
    run = [*honest_run(), *many, Leased(1, 5, tuple(range(10, 30)))]
    assert any(text.endswith(" and 24 more") for text in violations(run))
