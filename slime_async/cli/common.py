"""What the commands share: the CONFIG argument, and how a role's process begins and ends."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from slime_async.cli.flags import add_config_flags, overrides
from slime_async.cli.launcher import Role
from slime_async.config import Config, ConfigError, load_config
from slime_async.guard import GUARDED, die_with_parent
from slime_async.telemetry.logs import log_to_stderr
from slime_async.telemetry.process import PROCESS
from slime_async.telemetry.warnings import record_warnings

HUB_ADDRESS = "hub.address"
"""In a run's directory: where its hub listens"""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells count it: 128 + SIGINT"""


def add_config_argument(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """CONFIG, and a flag for each of its fields."""
    nargs = "?" if optional else None
    text = "TOML file; any key of it is also a flag, below"
    parser.add_argument("config", metavar="CONFIG", type=Path, nargs=nargs, help=text)
    add_config_flags(parser)


def add_role_arguments(parser: argparse.ArgumentParser, needs_hub: bool = True) -> None:
    """What every single role is told, beside the configuration."""
    add_config_argument(parser)
    parser.add_argument(
        "--run-directory", metavar="DIR", type=Path, required=True, help="where this role writes logs and metrics"
    )
    if needs_hub:
        parser.add_argument(
            "--hub",
            metavar="ADDRESS",
            help="the hub's address, tcp://HOST:PORT [what DIR/hub.address says]",
        )


def hub_of(parsed: argparse.Namespace) -> str:
    """The hub's address, as given or as it wrote it down. Raises ``ConfigError``."""
    if parsed.hub is not None:
        return str(parsed.hub)
    file = parsed.run_directory / HUB_ADDRESS
    try:
        return str(file.read_text().strip())
    except OSError:
        raise ConfigError(f"no {file}: the hub writes it when it listens; or give --hub tcp://HOST:PORT") from None


def config_of(parsed: argparse.Namespace) -> Config:
    """The file under the flags. Raises ``ConfigError``."""
    return load_config(parsed.config, overrides(parsed))


@contextmanager
def role(config: Config, kind: Role, name: str, run_directory: Path) -> Iterator[None]:
    """A role's process, from begin to end: it logs, warns, serves its numbers, and never outlives its launcher.

    It ends on SIGTERM through ``finally``, until it has its own way of leaving. Raises ``ConfigError``.
    """
    from slime_async.telemetry.prometheus import served
    from slime_async.transport.observer import SAMPLED

    PROCESS.begin(kind, name)
    log_to_stderr(PROCESS, config.loggers.format)
    record_warnings(run_directory, name)
    signal.signal(signal.SIGTERM, _leave)
    if os.environ.get(GUARDED):
        die_with_parent()
    with served(config.loggers, PROCESS, run_directory, SAMPLED):
        yield


def leave_at_once(exit_code: int = 0) -> NoReturn:
    """End this process without the interpreter's own shutdown, once everything is written and closed.

    That shutdown joins threads that native code may still hold, which has been seen to take a collective's timeout.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
