"""How a learner begins: which incarnation it is, and what it goes on from.

Rank 0 looks (``Start.take``), every rank is told (``Start.share``), and all load (``Start.load``).
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from slime_async.config import Config
from slime_async.config.resume import fixed_settings
from slime_async.learner.checkpoint.directory import CheckpointDirectory, next_incarnation
from slime_async.learner.checkpoint.state import LearnerState
from slime_async.learner.trainer import Counters, Trainer

log = logging.getLogger(__name__)

NO_CHECKPOINT = -1


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the learner."""

    incarnation: int
    """1 for a run's first, and never the same again in this run"""
    state: LearnerState | None = None
    """Of the checkpoint to go on from; None begins with the model's own weights"""

    @property
    def version(self) -> int:
        """The version whose weights it begins with."""
        return self.state.version if self.state else 0

    @classmethod
    def take(cls, run: Path, directory: CheckpointDirectory) -> Start:
        """The next incarnation, from the latest checkpoint if there is one. Removes what a killed learner left.

        Raises ``CheckpointError`` for a checkpoint that is not what it says.
        """
        directory.clean()
        latest = directory.latest()
        state = None if latest is None else LearnerState.read(directory.of(latest))
        return cls(next_incarnation(run), state)

    @staticmethod
    def share(start: Start | None, directory: CheckpointDirectory, device: torch.device) -> Start:
        """Rank 0's start, on every rank; the others give None. They must see the same files."""
        told = torch.zeros(2, dtype=torch.int64, device=device)
        if start is not None:
            told[0], told[1] = start.incarnation, start.state.version if start.state else NO_CHECKPOINT
        if dist.get_world_size() > 1:
            dist.broadcast(told, src=0)
        if start is not None:
            return start
        incarnation, version = told.tolist()
        return Start(incarnation, None if version == NO_CHECKPOINT else LearnerState.read(directory.of(version)))

    def load(self, config: Config, trainer: Trainer, directory: CheckpointDirectory) -> None:
        """Bring ``trainer`` to the checkpoint's state; without one it stays as it was built.

        Raises ``CheckpointError`` naming what differs between the checkpoint and this run.
        """
        if self.state is None:
            return
        model = trainer.model
        self.state.check(fixed_settings(config), dataclasses.asdict(model.architecture))
        progress = Counters(self.state.optimizer_steps, self.state.learning_rate, self.state.holds_reference)
        same_layout = self.state.layout == dataclasses.asdict(model.layout)
        trainer.load_checkpoint(directory.of(self.version), progress, same_layout=same_layout)
        log.info("incarnation %d goes on from the checkpoint of version %d", self.incarnation, self.version)
