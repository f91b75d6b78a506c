"""What the hub writes down of itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

from slime_async.config import Config
from slime_async.queue import QueueLimits, TaskStream, TrajectoryQueue
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.spans import read_tracks
from slime_async.transport.hub import REQUESTS
from slime_async.transport.observer import SAMPLED, HubObserver
from tests.hub.players import WAIT_S, make_config, run, stage


def test_closed_admission_is_a_span_with_its_cause(tmp_path: Path) -> None:
    observer = HubObserver.of_run(tmp_path)
    for cause in ("first_publication", "first_publication", None, "staleness", "drain"):
        observer.gate(cause)  # type: ignore[arg-type]
    observer.close()
    [track] = read_tracks(tmp_path / "spans")
    assert track.role == "hub"
    assert [span.args["cause"] for span in track.spans] == ["first_publication", "staleness", "drain"]


def test_samples_hold_the_queues_own_statistics(tmp_path: Path) -> None:
    config = Config()
    queue = TrajectoryQueue(QueueLimits.from_config(config), TaskStream.from_config(config))
    observer = HubObserver.of_run(tmp_path)
    observer.sample({**queue.statistics(0.0).as_report(), **dict.fromkeys(REQUESTS, 0)})
    observer.close()
    [line] = read_jsonl(tmp_path / "queue.jsonl")
    assert line.keys() == {"time_s", *SAMPLED}
    assert queue.admission_closed_by() == "first_publication"


def test_requests_are_those_of_all_actors_as_each_told_last(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(make_config(), observer=HubObserver.of_run(tmp_path)) as hub:
            one, other, learner = await hub.actor("one"), await hub.actor("other"), await hub.learner()
            one.client.set_report({"running_requests": 5, "waiting_requests": 1})
            other.client.set_report({"running_requests": 2, "waiting_requests": "a few"})
            learner.client.set_report({"running_requests": 100})
            async with asyncio.timeout(WAIT_S):
                while _requests(tmp_path) != (7, 1):
                    await asyncio.sleep(0.05)

    run(test())


def _requests(run_directory: Path) -> tuple[int, ...]:
    *_, line = {}, *read_jsonl(run_directory / "queue.jsonl")
    return tuple(line.get(name, 0) for name in REQUESTS)
