"""``slime-async actor``: one process that generates."""

from __future__ import annotations

import argparse
import logging

from slime_async.cli.common import add_role_arguments, begin_role, config_of
from slime_async.cli.launch import CONSEQUENCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_role_arguments(parser)
    parser.add_argument(
        "--name", required=True, help="unique in the run; an actor that is started again needs a new one"
    )


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    begin_role(parsed.name, parsed.run_directory)
    from slime_async.actors.worker import RunEnded, run_actor

    try:
        run_actor(config, parsed.name, parsed.hub, parsed.run_directory)
    except* RunEnded as ended:
        logging.getLogger(__name__).error("%s", ended.exceptions[0])
        exit_code = CONSEQUENCE
    else:
        exit_code = 0
    return exit_code
