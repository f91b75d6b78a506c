"""``slime-async learner``: one rank of the learner; under torchrun, each of its ranks."""

from __future__ import annotations

import argparse
import os

from slime_async.cli.common import add_role_arguments, config_of, hub_of, leave_at_once, role
from slime_async.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_role_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != config.learner.ranks:
        raise ConfigError(
            f"learner.ranks = {config.learner.ranks}, but this is one of {started}: start it with "
            f"torchrun --nproc-per-node {config.learner.ranks} -m slime_async.cli.main learner …"
        )
    name = f"learner-{os.environ['RANK']}" if started > 1 else "learner"
    with role(config, "learner", name, parsed.run_directory):
        from slime_async.learner.checkpoint.directory import CheckpointError
        from slime_async.learner.role import run_learner

        try:
            run_learner(config, hub_of(parsed), parsed.run_directory)
        except CheckpointError as error:  # a full disk, another model: starting again would not help
            raise ConfigError(str(error)) from error
    leave_at_once()  # a rank that has finished must not wait for native threads of collectives
