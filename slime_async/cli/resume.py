"""``slime-async train --resume RUN``: an earlier run goes on in its own directory, from its latest checkpoint.

One that was ended before its first checkpoint begins with the model's weights again, and trains on the batches that its
journal has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime_async.config import Config, ConfigError, load_config
from slime_async.config.load import Key
from slime_async.config.resume import refused_changes
from slime_async.learner.checkpoint.directory import CheckpointDirectory, CheckpointError


def resumed_config(run: Path, flags: Mapping[Key, Any]) -> Config:
    """The run's own configuration under the flags that may change on the way.

    Raises ``ConfigError`` for a directory that is no run, a run that cannot go on, and every flag that would make it
    another run.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise ConfigError(f"--resume {run}: there is no {file}; give the directory of a run, as its last line names it")
    config = load_config(file, flags)
    if refused := refused_changes(load_config(file), config):
        raise ConfigError("\n".join(refused))
    try:
        latest = CheckpointDirectory(run / "checkpoints").latest()
    except CheckpointError as error:
        raise ConfigError(f"--resume {run}: {error}") from None
    if latest is None and not config.checkpoint.interval_steps:
        raise ConfigError(
            f"--resume {run}: it has no checkpoint yet (checkpoint.interval_steps = {config.checkpoint.interval_steps})"
            f"; begin anew with slime-async train {file}"
        )
    if latest is not None and (latest > config.run.steps or (latest == config.run.steps and is_finished(run))):
        raise ConfigError(
            f"--resume {run}: all of run.steps = {config.run.steps} are trained; --run.steps {latest * 2} would go on"
        )
    if not (Path(config.model.path) / "config.json").is_file():
        raise ConfigError(
            f"--resume {run}: model.path = {config.model.path!r} has no config.json; say with --model.path where the "
            "checkpoint that the run began with lies now"
        )
    return config


def is_finished(run: Path) -> bool:
    """Whether a launcher saw its end, with evaluation and export."""
    summary = run / "summary.json"
    return summary.is_file() and json.loads(summary.read_text())["outcome"] == "finished"
