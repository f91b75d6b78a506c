"""``slime-async scale``: another number of actors for a running job; new ones join, the newest leave when done.

For runs that ``slime-async train`` supervises, with any launcher. Where Kubernetes starts the actors, or a Slurm job of
their own (``slime-async launch slurm --join``), they are scaled there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slime_async.cli.run_directory import is_owned
from slime_async.config import ConfigError, load_config

WANTED = "actors.wanted"
"""In the run's directory, which is where a supervisor looks: whoever may write there may scale"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run that goes on")
    parser.add_argument("actors", metavar="ACTORS", type=int, help="how many there shall be")


def run(parsed: argparse.Namespace) -> int:
    if parsed.actors < 0:
        raise ConfigError(f"ACTORS = {parsed.actors}: give 0 or more")
    if not (parsed.run / "config.toml").is_file():
        raise ConfigError(f"there is no {parsed.run / 'config.toml'}: give the directory of a run")
    if not is_owned(parsed.run):
        raise ConfigError(f"no launcher runs in {parsed.run}: begin it with --actor.count {parsed.actors}")
    config = load_config(parsed.run / "config.toml")
    if config.actor.devices and parsed.actors > config.actor.count:
        raise ConfigError(
            f"actor.devices = {list(config.actor.devices)} are shared out among actor.count = {config.actor.count} "
            f"actors: no GPU is left for more; start others elsewhere (slime-async actor --help)"
        )
    ask(parsed.run, parsed.actors)
    print(f"asked for {parsed.actors} actors; {parsed.run / 'events.jsonl'} tells who joins and leaves")
    return 0


def ask(run_directory: Path, actors: int) -> None:
    """The supervisor of this run sees to it within a second or two."""
    partial = run_directory / f"{WANTED}.partial"
    partial.write_text(str(actors))
    partial.rename(run_directory / WANTED)


def asked(run_directory: Path) -> int | None:
    """What was asked for last; None as long as nothing was."""
    try:
        return int((run_directory / WANTED).read_text())
    except FileNotFoundError:
        return None


def forget(run_directory: Path) -> None:
    """A run that starts has the number of its configuration, whatever was asked of an earlier launcher."""
    (run_directory / WANTED).unlink(missing_ok=True)
