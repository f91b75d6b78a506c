"""What a checkpoint says beside its tensors: ``state.json``, small and readable."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_async.learner.checkpoint.directory import CheckpointError, replace_text

FORMAT = 1
"""Of the file and of the tensors' names beside it"""
STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True)
class DataPosition:
    """How far training has come in the stream of tasks."""

    trajectories: int = 0
    """Trained so far"""
    tasks: int = 0
    """All trained tasks have a serial below it"""


@dataclass(frozen=True, slots=True)
class LearnerState:
    """Of one checkpoint."""

    incarnation: int
    """Who wrote it"""
    version: int
    """Batches trained. Also the position in the hub's journal: a learner that goes on from here is given the batches
    from this one on, again where they were trained before"""
    optimizer_steps: int
    """Of the warm-up, and of Adam"""
    learning_rate: float
    """After the warm-up"""
    holds_reference: bool
    """The weights that the KL term is against are among the tensors"""
    data: DataPosition
    layout: dict[str, int]
    """That wrote it: the random generators are each rank's own, and only restored under the same"""
    architecture: dict[str, Any]
    """Of the model"""
    settings: dict[str, Any]
    """Configuration that a run cannot change on its way, by key (``slime_async.config.resume``)"""

    def write(self, checkpoint: Path) -> None:
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2)
        replace_text(checkpoint / STATE_FILE, text + "\n")

    @classmethod
    def read(cls, checkpoint: Path) -> LearnerState:
        """Raises ``CheckpointError`` for a directory without such a file, or one of another release."""
        path = checkpoint / STATE_FILE
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            found = plain.pop("format")
            if found == FORMAT:
                return cls(**plain | {"data": DataPosition(**plain["data"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no checkpoint's state ({error}): resume from another one") from error
        raise CheckpointError(f"{path} has format {found}, this release reads {FORMAT}: use the one that wrote it")

    def check(self, settings: dict[str, Any], architecture: dict[str, Any]) -> None:
        """Raises ``CheckpointError`` that names whatever differs from what this checkpoint was trained with."""
        wanted = {f"model/{name}": value for name, value in self.architecture.items()} | self.settings
        present = {f"model/{name}": value for name, value in architecture.items()} | settings
        changed = [
            f"{name} is {present.get(name)!r} now and was {wanted.get(name)!r}"
            for name in sorted({*wanted, *present})
            if wanted.get(name) != present.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"the checkpoint of version {self.version} cannot be gone on from: {'; '.join(changed)}"
            )
