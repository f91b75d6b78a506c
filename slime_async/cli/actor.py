"""``slime-async actor``: one process that generates; it may join a running job, and leave it.

SIGTERM and SIGUSR1 (Slurm's notice) ask it to leave: it takes nothing new, finishes what it has begun within
``actor.drain_timeout_s``, returns the rest, and exits with code 143. A second signal makes it leave at once.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import socket
from pathlib import Path

from slime_async.cli.common import add_role_arguments, config_of, hub_of, leave_at_once, role
from slime_async.cli.launcher import CONSEQUENCE, LEFT
from slime_async.config import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_role_arguments(parser)
    parser.add_argument(
        "--name",
        help="unique in the run; an actor that is started again needs a new one [the machine, and a number]",
    )


def run(parsed: argparse.Namespace) -> int:
    config, hub = config_of(parsed), hub_of(parsed)
    name = parsed.name or f"actor-{socket.gethostname().partition('.')[0]}-{secrets.token_hex(3)}"
    with role(config, "actor", name, parsed.run_directory):
        exit_code = _act(config, name, hub, parsed.run_directory)
    leave_at_once(exit_code)  # an actor that was told to leave must not wait for native threads of collectives


def _act(config: Config, name: str, hub: str, run_directory: Path) -> int:
    from slime_async.actors.worker import RunEnded, run_actor

    try:
        left = run_actor(config, name, hub, run_directory)
    except* RunEnded as ended:
        logging.getLogger(__name__).error("%s", ended.exceptions[0])
        exit_code = CONSEQUENCE
    else:
        exit_code = LEFT if left else 0
    return exit_code
