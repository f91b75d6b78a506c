"""What the progress line says of each moment of a run."""

from __future__ import annotations

import asyncio

import pytest

from slime_async.cli.progress import TokenRate, progress_line, watch, who_waits
from slime_async.protocol import PeerStatus, Report, RunStatus

QUEUE: Report = {"held": 128, "held_limit": 768, "running": 5, "reserved": 0, "pacing": 700, "pacing_limit": 768}
LEARNER: Report = {
    "phase": "rl",
    "step": 17,
    "steps": 200,
    "activity": "train",
    "reward_mean": 0.4123,
    "learner_tokens_per_s": 9300.0,
    "staleness_mean": 0.94,
    "staleness_max": 2,
}
ACTOR = PeerStatus("actor", "actor-0", 0.1, {"generated_tokens": 100})


def status(learner: Report | None, queue: Report = QUEUE, *actors: PeerStatus) -> RunStatus:
    peers = () if learner is None else (PeerStatus("learner", "learner", 0.1, learner),)
    return RunStatus("run", queue, (*peers, *actors))


def test_a_line_of_rl_names_step_reward_rates_staleness_and_queue() -> None:
    assert progress_line(status(LEARNER, QUEUE, ACTOR), 2, 11800.0) == (
        "step 17/200 | reward 0.412 | generate 11.8k tok/s, train 9.3k tok/s | staleness 0.94 max 2/2 | "
        "queue 128/768 | both busy"
    )


@pytest.mark.parametrize(
    ("learner", "line"),
    [
        (None, "waiting for the learner to connect; 1 actor connected"),
        ({}, "starting"),
        ({"phase": "warm_start", "step": 300, "steps": 500, "loss": 0.712}, "warm start 300/500 loss 0.712"),
        ({"phase": "evaluation_before"}, "evaluation before RL: 40 tasks to go"),
        (
            {"phase": "rl", "activity": "lease"},
            "step 0/? | reward – | generate –, train – | staleness – max –/2 | queue 0/? | learner waits, actors idle",
        ),
    ],
)
def test_each_phase_has_its_line(learner: Report | None, line: str) -> None:
    queue: Report = {"evaluation_missing": 30, "evaluation_reserved": 10}
    assert progress_line(status(learner, queue, ACTOR), 2, None) == line


@pytest.mark.parametrize(
    ("activity", "changes", "wanted"),
    [
        ("lease", {}, "learner waits for actors"),
        ("lease", {"running": 0}, "learner waits, actors idle"),
        ("train", {}, "both busy"),
        ("train", {"running": 0, "held": 768}, "actors wait: queue full"),
        ("train", {"running": 0, "pacing": 768}, "actors wait: staleness bound"),
        ("train", {"running": 0}, "actors idle"),
    ],
)
def test_it_says_who_waits_for_whom(activity: str, changes: Report, wanted: str) -> None:
    assert who_waits({"activity": activity}, QUEUE | changes, [ACTOR]) == wanted


def test_token_rates_survive_the_restart_of_an_actor() -> None:
    rate = TokenRate()

    def seen(*counts: tuple[str, int]) -> tuple[PeerStatus, ...]:
        return tuple(PeerStatus("actor", name, 0.0, {"generated_tokens": count}) for name, count in counts)

    assert rate.update(seen(("actor-0", 100), ("actor-1", 50)), 10.0) is None
    assert rate.update(seen(("actor-0", 300), ("actor-1", 150)), 12.0) == 150.0
    assert rate.update(seen(("actor-0.1", 40), ("actor-1", 250)), 14.0) == 70.0


def test_the_view_shows_a_line_per_status_until_the_hub_is_lost() -> None:
    lines: list[str] = []
    answers = [status(None, QUEUE), status(LEARNER, QUEUE, ACTOR)]

    async def get_status() -> RunStatus:
        if not answers:
            raise ConnectionError("lost")
        return answers.pop(0)

    with pytest.raises(ConnectionError, match="lost"):
        asyncio.run(watch(get_status, lines.append, 2, interval_s=0.0))
    assert [line.split(" ")[0] for line in lines] == ["waiting", "step"]
