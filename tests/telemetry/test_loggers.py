"""Metrics in TensorBoard and W&B, read back from their files."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slime_async.config import Config, ConfigError
from slime_async.telemetry.loggers import check_extras, make_loggers

DEADLINE_S = 60.0
STEPS = [{"reward_mean": 0.25, "mismatch/ess": 0.9}, {"reward_mean": 0.5, "mismatch/ess": 0.8}]


def config(**loggers: Any) -> Config:
    return Config(loggers={"wandb_mode": "offline", **loggers})  # type: ignore[arg-type]


def log_steps(config: Config, run: Path) -> None:
    loggers = make_loggers(config, run)
    assert len(loggers) == 1
    for step, values in enumerate(STEPS):
        loggers[0].write(step, values)
    loggers[0].close()


def wandb_records(file: bytes) -> Iterator[bytes]:
    """W&B's own file: a header, then LevelDB's log of records cut into blocks."""
    assert file.startswith(b":W&B")
    at, record, block, header = 7, b"", 32768, 7
    while at + header <= len(file):
        left = block - at % block
        if left < header:
            at += left
            continue
        size, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        if at + header + size > len(file):
            return  # not all written yet
        record += file[at + header : at + header + size]
        at += header + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


def finished_wandb_run(run: Path) -> list[Any]:
    """Its records, once the last is there: W&B's own process writes them, and may be behind."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + DEADLINE_S
    while True:
        [path] = run.glob("wandb/offline-run-*/*.wandb")
        records = [Record.FromString(data) for data in wandb_records(path.read_bytes())]
        if records and records[-1].HasField("exit"):
            return records
        assert time.monotonic() < deadline, "W&B did not finish its file"
        time.sleep(0.05)


def test_nothing_is_logged_elsewhere_unless_asked(tmp_path: Path) -> None:
    assert make_loggers(config(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_every_metric_under_its_name(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(config(tensorboard=True), tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"reward_mean", "mismatch/ess"}
    assert [(event.step, event.value) for event in read.Scalars("reward_mean")] == [(0, 0.25), (1, 0.5)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_leaves_a_run_that_can_be_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "demo-1"
    run.mkdir()
    log_steps(config(wandb=True), run)
    records = finished_wandb_run(run)
    history = [
        {item.nested_key[0]: item.value_json for item in r.history.item} for r in records if r.HasField("history")
    ]
    found = [(int(values["_step"]), float(values["reward_mean"])) for values in history]
    configured = {item.key for record in records if record.HasField("run") for item in record.run.config.update}
    assert found == [(0, 0.25), (1, 0.5)]
    assert {"staleness", "learner"} <= configured


def test_a_missing_extra_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'slime-async\[wandb\]'"):
        check_extras(config(wandb=True))
    check_extras(config())
