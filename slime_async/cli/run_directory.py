"""The directory of one run: ``runs/NAME-YYYYmmdd-HHMMSS/``.

config.toml        as resolved: file, flags and defaults
environment.json   what it ran on              slime_async.telemetry.environment
logs/              stdout and stderr of every process
journal/           events and payloads         slime_async.transport.journal
metrics.jsonl      a line per step             slime_async.telemetry.metrics
queue.jsonl        how full the queue was      slime_async.transport.observer
events.jsonl       what else happened          slime_async.telemetry.events
spans/             who did what when           slime_async.telemetry.spans
checkpoints/       the learner's
summary.json       the result                  slime_async.telemetry.summary
report.html        all of it, to look at       slime_async.report
timeline.json      the spans, for Perfetto     slime_async.telemetry.timeline
"""

from __future__ import annotations

import itertools
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
    for name in ("logs", "spans", "checkpoints"):
        (run / name).mkdir()
    return run


def write_config(config: Config, run: Path) -> None:
    """The configuration as resolved; the roles read this file."""
    (run / "config.toml").write_text(dump_toml(config), encoding="utf-8")
