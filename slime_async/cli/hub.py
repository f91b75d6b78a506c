"""``slime-async hub``: the queue's process."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from slime_async.cli.common import HUB_ADDRESS, add_role_arguments, config_of, role
from slime_async.cli.launcher import CONSEQUENCE, LEFT
from slime_async.config import Config, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_role_arguments(parser, needs_hub=False)
    parser.add_argument(
        "--ready-file", metavar="FILE", type=Path, help="gets the address once the hub listens [DIR/hub.address]"
    )


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    with role(config, "hub", "hub", parsed.run_directory):
        return _serve(config, parsed.run_directory, parsed.ready_file or parsed.run_directory / HUB_ADDRESS)


def _serve(config: Config, run_directory: Path, ready_file: Path) -> int:
    from slime_async.actors.judging import make_judge
    from slime_async.transport.hub import HubStopped, LearnerLost, run_hub
    from slime_async.transport.journal import JournalError

    try:
        run_hub(config, run_directory, ready_file, make_judge(config))
    except JournalError as error:  # starting it again would not help: the text says what would
        raise ConfigError(str(error)) from error
    except LearnerLost as lost:
        logging.getLogger(__name__).error("%s", lost)
        return CONSEQUENCE
    except HubStopped:
        return LEFT
    return 0
