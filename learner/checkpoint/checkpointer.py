"""Writes checkpoints beside training, and exports in Hugging Face's format.

::

    training loop (every rank)                  writer threads (one per rank)          rank 0
    after_batch(v): due? ── copy the state ───► shards of v.partial ─┐
    after_batch(v + 1): all over? no            …                    │
    after_batch(v + 2): all over? yes ◄─────────────────────────────┘ ──► index, sync, rename, latest ──► durable(v)

Consumes trained versions; waits only when a checkpoint is due before the one before it is written, and at the end, each
time until ``checkpoint.timeout_s``. A write that fails or takes longer raises ``CheckpointError`` on every rank at the
next batch.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from slime_async.config import Config
from slime_async.config.resume import fixed_settings
from slime_async.learner.checkpoint.directory import PARTIAL, CheckpointDirectory, CheckpointError
from slime_async.learner.checkpoint.state import DataPosition, LearnerState
from slime_async.learner.megatron.checkpoint import StateWrite
from slime_async.learner.trainer import Trainer
from slime_async.protocol import Batch

log = logging.getLogger(__name__)

OnDurable = Callable[[int, float], None]
"""Called on rank 0 with (version, seconds of writing) once ``latest`` names it"""

DONE, RUNNING, LATE, FAILED = range(4)
"""What a rank knows of its own writing; the worst of all ranks decides"""


@dataclass(frozen=True, slots=True)
class _Pending:
    state: LearnerState
    write: StateWrite
    deadline: float


class Checkpointer:
    """One per rank; all ranks call the same methods with the same arguments."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        directory: CheckpointDirectory,
        incarnation: int,
        resumed: LearnerState | None,
        on_durable: OnDurable,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._directory = directory
        self._incarnation = incarnation
        self._data = resumed.data if resumed else DataPosition()
        self._last = resumed.version if resumed else -1
        self._on_durable = on_durable
        self._leads = dist.get_rank() == 0
        self._pending: _Pending | None = None

    def after_batch(self, version: int, batch: Batch) -> float:
        """The model holds ``version`` now, trained on ``batch``; returns the seconds that this kept it from training.

        Raises ``CheckpointError``.
        """
        begun = time.monotonic()
        self._data = DataPosition(
            self._data.trajectories + len(batch.trajectories),
            max([self._data.tasks, *(t.task.serial + 1 for t in batch.trajectories)]),
        )
        self._collect()
        if _due(version, self._config.checkpoint.hf_interval_steps):
            self._export(version)  # before a checkpoint of this version, from which nobody would export it again
        if _due(version, self._config.checkpoint.interval_steps):
            self.begin(version)
        return time.monotonic() - begun

    def begin(self, version: int) -> None:
        """Begin to write the present state as ``version``, once what is being written is complete."""
        self._collect(wait=True)
        if self._leads:
            self._directory.begin(version)
        dist.barrier()
        state = self._state(version)
        write = self._trainer.begin_checkpoint(self._directory.partial(version))
        self._pending = _Pending(state, write, time.monotonic() + self._config.checkpoint.timeout_s)
        self._last = version
        if not self._config.checkpoint.async_write:
            self._collect(wait=True)

    def finish(self, version: int) -> None:
        """The end of training: ``version`` has a checkpoint when this returns."""
        if self._last != version:
            self.begin(version)
        self._collect(wait=True)

    def _state(self, version: int) -> LearnerState:
        progress, model = self._trainer.progress, self._trainer.model
        return LearnerState(
            incarnation=self._incarnation,
            version=version,
            optimizer_steps=progress.optimizer_steps,
            learning_rate=progress.learning_rate,
            holds_reference=progress.holds_reference,
            data=self._data,
            layout=dataclasses.asdict(model.layout),
            architecture=dataclasses.asdict(model.architecture),
            settings=fixed_settings(self._config),
        )

    def _collect(self, *, wait: bool = False) -> None:
        """Complete the checkpoint that is being written, if all ranks are through with it."""
        if self._pending is None:
            return
        pending, version = self._pending, self._pending.state.version
        left_s = pending.deadline - time.monotonic()
        over = pending.write.is_over(max(0.0, left_s) if wait else 0.0)
        own = (FAILED if pending.write.error else DONE) if over else (LATE if wait or left_s <= 0 else RUNNING)
        worst = self._worst_of_all(own)
        if worst == RUNNING:
            return
        self._pending = None
        if worst != DONE:
            raise CheckpointError(self._complaint(version, own, pending.write.error)) from pending.write.error
        pending.write.finish()
        if self._leads:
            self._complete(pending.state)
            self._on_durable(version, pending.write.seconds)

    def _complete(self, state: LearnerState) -> None:
        try:
            state.write(self._directory.partial(state.version))
            self._directory.complete(state.version, self._config.checkpoint.keep)
        except OSError as error:
            raise CheckpointError(self._complaint(state.version, FAILED, error)) from error
        log.info("checkpoint of version %d: %s", state.version, self._directory.of(state.version))

    def _worst_of_all(self, own: int) -> int:
        worst = torch.tensor(own, device=self._trainer.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        return int(worst)

    def _complaint(self, version: int, own: int, error: BaseException | None) -> str:
        what = f"the checkpoint of version {version} in {self._directory.path}"
        if own == FAILED:
            return f"{what} could not be written: {error}; make room there, or set checkpoint.interval_steps = 0"
        if own == LATE:
            return f"{what} was not written within checkpoint.timeout_s = {self._config.checkpoint.timeout_s:g} s"
        return f"{what} failed on another rank, whose log says why"

    def _export(self, version: int) -> None:
        """An ordinary Hugging Face checkpoint, there in full or not at all."""
        target = self._directory.path / "hf" / self._directory.of(version).name
        partial = target.with_suffix(PARTIAL)
        if self._leads and partial.exists():
            shutil.rmtree(partial)
        self._trainer.save_hf(partial)
        if self._leads:
            if target.exists():  # by a learner that was killed later
                shutil.rmtree(target)
            os.rename(partial, target)


def _due(version: int, interval: int) -> bool:
    return interval > 0 and version % interval == 0
