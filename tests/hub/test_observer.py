"""What the hub writes down of itself."""

from __future__ import annotations

from pathlib import Path

from slime_async.config import Config
from slime_async.queue import QueueLimits, TaskStream, TrajectoryQueue
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.spans import read_tracks
from slime_async.transport.observer import SAMPLED, HubObserver


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
    observer.sample(queue.statistics(0.0).as_report())
    observer.close()
    [line] = read_jsonl(tmp_path / "queue.jsonl")
    assert line.keys() == {"time_s", *SAMPLED}
    assert queue.admission_closed_by() == "first_publication"
