"""``slime-async launch slurm``: write a job script for a run, or for actors that join one, and submit it.

The script ends in the run's directory, beside everything else; ``--dry-run`` only writes it.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from slime_async.cli.common import add_config_argument, config_of
from slime_async.cli.flags import overrides
from slime_async.cli.launch_slurm import slurm_command
from slime_async.cli.run_directory import make_run_directory, open_run_directory
from slime_async.cli.slurm_job import actors_script, run_script
from slime_async.cli.train import check_modules
from slime_async.config import Config, ConfigError, dump_toml, load_config
from slime_async.telemetry.loggers import check_extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scheduler", metavar="slurm", choices=["slurm"], help="which scheduler gets the job")
    add_config_argument(parser, optional=True)
    parser.add_argument(
        "--run-directory", metavar="DIR", type=Path, help="of the run, on a disk that all nodes share [made anew]"
    )
    parser.add_argument("--join", metavar="RUN", type=Path, help="in place of CONFIG: actors for the run there")
    parser.add_argument("--actors", metavar="N", type=int, default=1, help="with --join: how many [1]")
    parser.add_argument("--dry-run", action="store_true", help="write the script, and say how to submit it")


def run(parsed: argparse.Namespace) -> int:
    if (parsed.config is None) == (parsed.join is None):
        raise ConfigError("give a configuration, or --join RUN for further actors of a run")
    script = joining(parsed) if parsed.join is not None else beginning(parsed)
    print(f"job script: {script}", flush=True)
    if parsed.dry_run:
        print(f"submit it with: sbatch {script}")
        return 0
    print(slurm_command(("sbatch", str(script))).strip())
    return 0


def beginning(parsed: argparse.Namespace) -> Path:
    """Write the run's directory with its job script."""
    config = config_of(parsed)
    check_modules(config)
    check_extras(config)
    check_requeue(config)
    if parsed.run_directory is None:
        directory = make_run_directory(config, datetime.now()).resolve()
    else:
        directory = open_run_directory(parsed.run_directory)
    file = directory / "slurm.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    script = directory / "slurm.sh"
    script.write_text(run_script(config, file, directory), encoding="utf-8")
    print(f"run directory: {directory}")
    return script


def joining(parsed: argparse.Namespace) -> Path:
    """Write a job script for actors beside those of a run."""
    directory = parsed.join.resolve()
    if not (directory / "config.toml").is_file():
        raise ConfigError(f"--join {parsed.join}: there is no {directory / 'config.toml'}; give a run's directory")
    if parsed.actors < 1:
        raise ConfigError(f"--actors {parsed.actors}: give 1 or more")
    config = load_config(directory / "config.toml", overrides(parsed))
    script: Path = directory / "slurm-actors.sh"
    script.write_text(actors_script(config, directory, parsed.actors), encoding="utf-8")
    return script


def check_requeue(config: Config) -> None:
    """Raise ``ConfigError`` when a requeued job would have nothing to go on from."""
    if not config.checkpoint.interval_steps:
        raise ConfigError(
            "checkpoint.interval_steps = 0: a job that is requeued would have nothing to go on from; set it, to 20 for "
            "example"
        )
    if not config.hub.journal:
        raise ConfigError("hub.journal = false: a job that is requeued would have lost its queue; leave it on")
