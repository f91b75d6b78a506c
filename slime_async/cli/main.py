"""The ``slime-async`` command. Each command is a module, imported when it is asked for: ``--help`` loads no torch.

Exit codes: 0 done; 1 the run failed; 2 the user has to change something; 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from slime_async import __version__
from slime_async.cli.common import INTERRUPTED
from slime_async.cli.flags import FlagParser
from slime_async.cli.launcher import USER_ERROR
from slime_async.config import ConfigError

TITLE = "Fully asynchronous off-policy RL post-training of language models"
COMMANDS = {
    "train": "start hub, actors and learner, here or on a cluster, and train until run.steps",
    "launch": "submit a run to a cluster's scheduler",
    "scale": "another number of actors for a running job",
    "top": "a running job's roles, rates, staleness, queue and last errors",
    "check-task": "play a task's episodes on a random engine, and say what would spoil training",
    "eval": "held-out accuracy of a checkpoint",
    "audit": "prove from a run's journal and metrics that nothing was lost and nothing trained twice",
    "doctor": "what on this machine will not work, and what to do about it",
    "report": "a run, or several compared, as one HTML file",
    "bench": "synchronous against asynchronous training on the same devices",
    "simulate": "a cluster in virtual time, with the real admission and queue code",
    "plan": "how to split a cluster between actors and learner",
    "hub": "one role: the queue, which the others connect to",
    "actor": "one role: generates trajectories",
    "learner": "one role: trains and publishes weights (one process per rank)",
    "keygen": "make CURVE keys for hub and clients",
}
"""Each is the module ``slime_async.cli.NAME``, a dash as ``_``, with ``add_arguments(parser)`` and
``run(parsed) -> exit code``"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. User errors are told in a line, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments)
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"slime-async: {line}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _dispatch(arguments: Sequence[str]) -> int:
    listing = "\n".join(f"  {name:12}{text}" for name, text in COMMANDS.items())
    top = FlagParser(
        prog="slime-async",
        description=f"{TITLE}\n\ncommands (slime-async COMMAND --help lists the flags of each):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"slime-async {__version__}")
    top.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the above")
    command = top.parse_strictly(arguments[:1]).command

    if "" not in sys.path:  # modules that a configuration names are found where the command runs, as under python -m
        sys.path.insert(0, "")
    module = importlib.import_module(f"slime_async.cli.{command.replace('-', '_')}")
    parser = FlagParser(
        prog=f"slime-async {command}", description=(module.__doc__ or "").replace("``", ""), allow_abbrev=False
    )
    module.add_arguments(parser)
    return int(module.run(parser.parse_strictly(arguments[1:])))


if __name__ == "__main__":
    sys.exit(main())
