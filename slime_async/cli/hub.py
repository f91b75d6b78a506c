"""``slime-async hub``: the queue's process."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from slime_async.cli.common import add_role_arguments, begin_role, config_of
from slime_async.cli.launch import CONSEQUENCE
from slime_async.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_role_arguments(parser, needs_hub=False)
    parser.add_argument(
        "--ready-file", metavar="FILE", type=Path, help="gets the address once the hub listens [DIR/hub.address]"
    )


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    begin_role("hub", parsed.run_directory)
    from slime_async.actors.judging import make_judge
    from slime_async.transport.hub import LearnerLost, run_hub
    from slime_async.transport.journal import JournalError

    ready_file = parsed.ready_file or parsed.run_directory / "hub.address"
    try:
        run_hub(config, parsed.run_directory, ready_file, make_judge(config))
    except JournalError as error:  # starting it again would not help: the text says what would
        raise ConfigError(str(error)) from error
    except LearnerLost as lost:
        logging.getLogger(__name__).error("%s", lost)
        return CONSEQUENCE
    return 0
