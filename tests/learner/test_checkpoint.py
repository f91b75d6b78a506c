"""Checkpoints of one rank: exact resume after SIGKILL, atomicity, failures, retention."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import SECTIONS, FileOutlet, RecordedFeed, life, recorded, train_life, train_run
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import AutoModelForCausalLM

from slime_async.config import Config
from slime_async.config.schema import RunConfig
from slime_async.learner.batch import prepare_batch
from slime_async.learner.checkpoint.checkpointer import Checkpointer
from slime_async.learner.checkpoint.directory import CheckpointDirectory, CheckpointError, next_incarnation
from slime_async.learner.checkpoint.start import Start
from slime_async.learner.checkpoint.state import LearnerState
from slime_async.learner.trainer import Trainer
from slime_async.protocol import Batch
from slime_async.queue import LeasedBatch, QueueLimits, TaskStream, TrajectoryMeta, TrajectoryQueue
from slime_async.telemetry.metrics import read_metrics
from slime_async.trajectory import Trajectory, TrajectoryKey

DEADLINE_S = 60.0
Checkpoints = Callable[[str], Path]


def make_config(**sections: dict[str, Any]) -> Config:
    return Config.model_validate(
        {name: SECTIONS.get(name, {}) | sections.get(name, {}) for name in SECTIONS | sections}
    )


def run_until_killed(config: Config, model: Path, run: Path, stop: int) -> None:
    """A learner in a process of its own, killed in the middle of the step after the batch ``stop`` was trained."""
    program = [sys.executable, str(Path(__file__).with_name("recorded.py"))]
    arguments = [str(run), str(model), config.model_dump_json(), str(stop)]
    process = subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(DEADLINE_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        said = list(iter(process.stdout.readline, f"trained {stop}\n")) if stop >= 0 else []
        assert [*said, f"trained {stop}\n"] == [f"trained {v}\n" for v in range(stop + 1)]
    finally:
        watchdog.cancel()
        process.kill()
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == -9, errors[-3000:]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines(run: Path) -> list[dict[str, Any]]:
    """What the run says of its steps, without what depends on time or on who said it."""
    kept = (dict(line) for line in read_metrics(run / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.endswith("_s") and k != "incarnation"} for line in kept]


@pytest.mark.parametrize(
    "sections",
    [
        {"checkpoint": {"async_write": False}},
        {"model": {"dtype": "bfloat16"}, "megatron": {"use_distributed_optimizer": True}},
    ],
    ids=["fp32", "bf16, distributed optimizer, written behind"],
)
def test_a_learner_killed_and_resumed_ends_with_bitwise_the_weights_of_one_that_was_not(
    sections: dict[str, Any], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    config, model = make_config(**sections), checkpoints("qwen3")
    straight, durable = train_run(config, model, tmp_path / "straight")
    assert durable == [3, 6]
    run = tmp_path / "killed"
    run_until_killed(config, model, run, stop=4)
    directory = CheckpointDirectory(run / "checkpoints")
    first = directory.latest() or 0  # what is written behind may not have been complete yet
    assert first == 3 or (first == 0 and config.checkpoint.async_write)
    resumed, durable = train_run(config, model, run)
    assert durable == ([6] if first else [3, 6])
    assert same(resumed, straight)
    assert lines(run) == lines(tmp_path / "straight")
    incarnations = [line["incarnation"] for line in read_metrics(run / "metrics.jsonl")]
    assert incarnations == [1 if step < first else 2 for step in range(6)]
    state = LearnerState.read(directory.of(6))
    assert (state.incarnation, state.version, state.data.trajectories, state.data.tasks) == (2, 6, 36, 18)


class Killed(Exception):
    """Stands for SIGKILL."""


class QueueFeed:
    """A learner's side of the hub: the queue itself, and one actor that answers grants at once."""

    def __init__(self, config: Config) -> None:
        self.queue = TrajectoryQueue(QueueLimits.from_config(config), TaskStream({"train": 1.0}, shuffle=False))
        self.queue.declare_sources({"train": 100})
        self.batches: list[tuple[int, int, bool]] = []
        """(incarnation, version, whether it was trained before) of every batch leased"""
        self._payloads: dict[TrajectoryKey, Trajectory] = {}

    def join(self, start: Start) -> None:
        self._incarnation = start.incarnation
        self.queue.learner_joined(start.incarnation, start.version, 0.0)
        self.queue.publish(start.incarnation, start.version, 0.0)

    def next_batch(self, train_version: int) -> Batch:
        for reservation in self.queue.grant("actor", 100, 0.0):
            trajectory = recorded(reservation.task, reservation.sample, self.queue.published_version)
            self._payloads[trajectory.key] = trajectory
            assert self.queue.deliver(TrajectoryMeta.of(trajectory, 1), "actor", 0.0) == "accepted"
        leased = self.queue.lease(self._incarnation, train_version, 0.0)
        assert isinstance(leased, LeasedBatch), leased
        self.batches.append((self._incarnation, train_version, leased.retrained))
        return Batch(train_version, tuple(self._payloads[key] for key in leased.keys))

    def commit(self, version: int) -> None:
        self.queue.commit(self._incarnation, version, 0.0)

    def publish(self, version: int) -> None:
        self.queue.publish(self._incarnation, version, 0.0)


def test_a_returning_learner_is_given_the_batches_that_its_checkpoint_lacks_and_ends_with_the_same_weights(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    config = make_config(checkpoint={"interval_steps": 2, "async_write": False}, staleness={"max_staleness": 1})
    config, model = config.model_copy(update={"run": RunConfig(steps=6)}), checkpoints("qwen3")

    def live(run: Path, feed: QueueFeed, dies_at: int = -1) -> dict[str, torch.Tensor]:
        def committed(version: int) -> None:
            feed.commit(version)
            if version == dies_at:
                raise Killed
            feed.publish(version + 1)

        with life(config, model, run) as (trainer, start, directory):
            feed.join(start)
            outlet = FileOutlet(run, start.incarnation, committed)
            outlet.on_durable = lambda version: feed.queue.make_durable(start.incarnation, version)
            return train_life(config, trainer, start, directory, feed, outlet)

    straight = live(tmp_path / "straight", QueueFeed(config))
    feed = QueueFeed(config)
    with pytest.raises(Killed):
        live(tmp_path / "killed", feed, dies_at=3)
    again = live(tmp_path / "killed", feed)
    assert feed.batches == [(1, v, False) for v in range(4)] + [(2, v, v < 4) for v in range(2, 6)]
    assert same(again, straight)
    assert {key.task for key in feed.queue.payload_keys()} == {18, 19, 20}  # the batch after the last one


def test_the_next_start_removes_what_a_killed_learner_left_and_goes_on_from_latest(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    for version in (2, 4):
        directory.begin(version)
        (directory.partial(version) / "weights").write_text(str(version))
        directory.complete(version, keep=2)
    directory.begin(6)  # killed while it was written
    directory.of(8).mkdir()  # killed between the renaming and the replacement of latest
    directory.of(0).with_suffix(".old").mkdir()  # killed while it was removed
    directory.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "version-00000002", "version-00000004"]
    assert directory.latest() == 4
    assert (directory.of(4) / "weights").read_text() == "4"


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    for version in range(1, 6):
        directory.begin(version)
        directory.complete(version, keep=2)
    assert directory.versions() == [4, 5]
    assert directory.latest() == 5


@pytest.mark.parametrize("failing", ["fsync", "rename", "replace"])
def test_latest_names_the_checkpoint_before_whichever_step_fails(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = CheckpointDirectory(tmp_path)
    directory.begin(1)
    directory.complete(1, keep=1)
    directory.begin(2)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(f"os.{failing}", fail)
        with pytest.raises(OSError, match="No space left"):
            directory.complete(2, keep=1)
    directory.clean()
    assert (directory.latest(), directory.versions()) == (1, [1])


def test_latest_that_names_nothing_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("version-00000007\n")
    with pytest.raises(CheckpointError, match=r"names 'version-00000007', which is not there: write the name"):
        CheckpointDirectory(tmp_path).latest()


def test_no_two_starts_share_an_incarnation(tmp_path: Path) -> None:
    assert [next_incarnation(tmp_path) for _ in range(3)] == [1, 2, 3]


@dataclass
class Learner:
    """One batch per call, and what its checkpointer told."""

    trainer: Trainer
    checkpointer: Checkpointer
    config: Config
    durable: list[int]

    def step(self, version: int) -> None:
        batch = RecordedFeed().next_batch(version)
        self.trainer.train_policy(prepare_batch(batch.trajectories, version, self.config).sequences, version)
        self.checkpointer.after_batch(version + 1, batch)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.trainer.export()}


@contextmanager
def learner(model: Path, run: Path, **checkpoint: Any) -> Iterator[Learner]:
    config, durable = make_config(checkpoint=checkpoint), list[int]()
    with life(config, model, run) as (trainer, start, directory):

        def tell(version: int, _seconds: float) -> None:
            durable.append(version)

        checkpointer = Checkpointer(config, trainer, directory, start.incarnation, start.state, tell)
        yield Learner(trainer, checkpointer, config, durable)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writers wait for this event before they write anything."""
    event, write_data = threading.Event(), FileSystemWriter.write_data

    def held(self: FileSystemWriter, *arguments: Any) -> Any:
        assert event.wait(DEADLINE_S)
        return write_data(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", held)
    yield event
    event.set()


def test_training_goes_on_behind_a_write_and_does_not_change_what_is_written(
    released: threading.Event, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model, directory = checkpoints("qwen3"), CheckpointDirectory(tmp_path / "checkpoints")
    with learner(model, tmp_path, interval_steps=2) as first:
        first.step(0)
        first.step(1)
        expected = first.weights()
        first.step(2)
        assert first.durable == []
        assert directory.latest() is None
        released.set()
        first.step(3)  # a checkpoint is due again: it waits for the one before
        assert first.durable[:1] == [2]
        first.checkpointer.finish(4)
        assert first.durable == [2, 4]
    (directory.path / "latest").write_text(directory.of(2).name)
    with learner(model, tmp_path) as second:
        assert same(second.weights(), expected)
        assert second.trainer.progress.optimizer_steps == 2
    assert directory.versions() == [2]  # what is newer is of a history that was given up


def test_a_write_that_fails_ends_training_at_the_next_batch_or_at_the_end(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full_disk)
    model, complaint = checkpoints("qwen3"), r"version 1 in .* could not be written: .*No space left.*; make room"
    with learner(model, tmp_path / "next", interval_steps=1) as first:
        first.step(0)
        with pytest.raises(CheckpointError, match=complaint):
            first.step(1)
    with learner(model, tmp_path / "end") as second:
        second.step(0)
        with pytest.raises(CheckpointError, match=complaint):
            second.checkpointer.finish(1)
        assert second.durable == []


def test_a_write_that_takes_too_long_ends_training(
    released: threading.Event, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    with learner(checkpoints("qwen3"), tmp_path, interval_steps=1, timeout_s=0.05) as late:
        late.step(0)
        with pytest.raises(CheckpointError, match=r"version 1 .* not written within checkpoint\.timeout_s = 0\.05 s"):
            late.checkpointer.finish(1)


def test_a_checkpoint_of_another_run_or_model_is_refused_by_the_names_that_differ(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model = checkpoints("qwen3")
    with learner(model, tmp_path) as first:
        first.checkpointer.finish(0)
    other = make_config(algorithm={"clip_low": 0.1}, batch={"group_size": 3})
    with (
        pytest.raises(CheckpointError, match=r"algorithm\.clip_low is 0\.1 now and was .*; batch\.group_size is 3 now"),
        life(other, model, tmp_path),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="model/tied is False now and was True"),
        life(make_config(), checkpoints("qwen3-untied"), tmp_path),
    ):
        pass


def test_a_checkpoint_without_a_readable_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json is no checkpoint's state"):
        LearnerState.read(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this release reads 1"):
        LearnerState.read(tmp_path)


def test_exports_at_steps_are_ordinary_checkpoints_of_the_weights_then(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    with learner(checkpoints("qwen3"), tmp_path, hf_interval_steps=2) as exporting:
        exporting.step(0)
        exporting.step(1)
        expected = exporting.weights()
        exporting.step(2)
    [export] = (tmp_path / "checkpoints" / "hf").iterdir()
    assert export.name == "version-00000002"
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    assert same({n: p for n, p in model.state_dict().items() if n in expected}, expected)
