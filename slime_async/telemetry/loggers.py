"""Where a run's metrics go besides ``metrics.jsonl``: TensorBoard and Weights & Biases, each an extra.

Both take the names of ``slime_async.telemetry.metrics`` as they are. A logger that cannot be made ends the run before
it trains anything.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from slime_async.config import Config, ConfigError

EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Switch in ``[loggers]`` → package, which the extra of the same name installs"""


class Logger(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None:
        """Everything is on its way when this returns."""


class TensorBoardLogger:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """One W&B run, named as the run directory; its own files are in ``RUN/wandb``."""

    def __init__(self, config: Config, run_directory: Path) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=config.loggers.wandb_project,
            name=run_directory.name,
            id=run_directory.name,
            dir=str(run_directory),
            mode=config.loggers.wandb_mode,
            config=config.model_dump(mode="json"),
            resume="allow" if config.loggers.wandb_mode == "online" else None,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def make_loggers(config: Config, run_directory: Path) -> list[Logger]:
    """Those that the configuration switches on. Raises ``ConfigError`` when a package is missing."""
    check_extras(config)
    loggers: list[Logger] = []
    if config.loggers.tensorboard:
        loggers.append(TensorBoardLogger(run_directory / "tensorboard"))
    if config.loggers.wandb:
        loggers.append(WandbLogger(config, run_directory))
    return loggers


def check_extras(config: Config) -> None:
    """Raise ``ConfigError`` for loggers that are switched on and not installed."""
    missing = [
        f"loggers.{switch} = true, but {package} is not installed: pip install 'slime-async[{switch}]'"
        for switch, package in EXTRAS.items()
        if getattr(config.loggers, switch) and importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ConfigError("\n".join(missing))
