"""The directory of one run: ``runs/NAME-YYYYmmdd-HHMMSS/``.

config.toml        as resolved: file, flags and defaults
environment.json   what it ran on              slime_async.telemetry.environment
logs/              stdout and stderr of every process
journal/           events and payloads         slime_async.transport.journal
metrics.jsonl      a line per step             slime_async.telemetry.metrics
queue.jsonl        how full the queue was      slime_async.transport.observer
events.jsonl       what else happened          slime_async.telemetry.events
spans/             who did what when           slime_async.telemetry.spans
checkpoints/       the learner's               slime_async.learner.checkpoint.directory
incarnation        how often it was started
lock               held by the launcher
summary.json       the result                  slime_async.telemetry.summary
report.html        all of it, to look at       slime_async.report
timeline.json      the spans, for Perfetto     slime_async.telemetry.timeline
"""

from __future__ import annotations

import fcntl
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from slime_async.config import Config, ConfigError, dump_toml

JOURNAL = "journal"
"""The hub makes it"""


def make_run_directory(config: Config, now: datetime) -> Path:
    """Make the directory with its resolved configuration; a second run in the same second gets a number."""
    stem = f"{config.run.name}-{now:%Y%m%d-%H%M%S}"
    for attempt in itertools.count(1):
        run = config.run.directory / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            run.mkdir(parents=True)
        except FileExistsError:
            if run.is_dir():
                continue
            raise ConfigError(f"run.directory = {str(config.run.directory)!r} has a file in its path") from None
        except OSError as error:
            text = f"run.directory = {str(config.run.directory)!r} cannot be written: {error.strerror}"
            raise ConfigError(text) from None
        break
    _make_folders(run)
    return run


def open_run_directory(run: Path) -> Path:
    """Make this very directory, if need be, and give its absolute path. Raises ``ConfigError``."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        _make_folders(run)
    except OSError as error:
        raise ConfigError(f"--run-directory {run} cannot be written: {error.strerror}") from None
    return run.resolve()


def _make_folders(run: Path) -> None:
    for name in ("logs", "spans", "checkpoints"):
        (run / name).mkdir(exist_ok=True)


def write_config(config: Config, run: Path) -> None:
    """The configuration as resolved; the roles read this file."""
    (run / "config.toml").write_text(dump_toml(config), encoding="utf-8")


@contextmanager
def owned(run: Path) -> Iterator[None]:
    """No other launcher runs in this directory meanwhile. Raises ``ConfigError`` when one does."""
    with (run / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another launcher runs in {run}: wait for its end, or stop it") from None
        yield


def is_owned(run: Path) -> bool:
    """Whether a launcher runs in this directory now."""
    try:
        with owned(run):
            return False
    except ConfigError:
        return True
