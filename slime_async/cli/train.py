"""``slime-async train``: hub, actors and learner, on this machine or a cluster's, watched until the last step."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from slime_async.cli.common import add_config_argument, config_of
from slime_async.cli.flags import overrides
from slime_async.cli.launchers import LAUNCHERS, MakeLauncher, listening_address, make_local, maker_of, with_keys
from slime_async.cli.observe import observe
from slime_async.cli.prepare import prepare_model
from slime_async.cli.result import print_summary
from slime_async.cli.resume import is_finished, resumed_config
from slime_async.cli.roles import plan_run
from slime_async.cli.run_directory import make_run_directory, open_run_directory, owned, write_config
from slime_async.cli.scale import asked, forget
from slime_async.cli.supervise import RunError, RunPlan, Supervisor
from slime_async.config import Config, ConfigError
from slime_async.config.checks import function_paths
from slime_async.protocol import Scalar
from slime_async.telemetry.environment import write_environment
from slime_async.telemetry.events import EventLog, EventName
from slime_async.telemetry.loggers import check_extras
from slime_async.telemetry.summary import write_summary

Watch = Callable[[Config, Path, str], Coroutine[Any, Any, None]]
"""(config, run directory, the hub's address); shows progress until it is cancelled"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, optional=True)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        type=Path,
        help="in place of CONFIG: go on with the run in this directory, from its latest checkpoint",
    )
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="local",
        help="what starts the roles: this machine, the Slurm job that this runs in, or the Ray cluster of RAY_ADDRESS",
    )
    parser.add_argument(
        "--run-directory",
        metavar="DIR",
        type=Path,
        help="begin in this directory, or go on with the run that is there [a new one below run.directory]",
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="also report what as many supervised steps reach without RL (sets warm_start.control-steps to run.steps)",
    )

    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train two small steps of a tiny model on sample data, on this CPU, to see that everything fits together",
    )


def run(parsed: argparse.Namespace) -> int:
    if parsed.resume is not None:
        return resume(parsed)
    if parsed.config is None:
        raise ConfigError("give a configuration (examples/demo.toml is one), or --resume RUN to go on with a run")
    config = config_of(parsed)
    if parsed.control:
        config = with_control(config)
    if parsed.run_directory is not None and (parsed.run_directory / "config.toml").is_file():
        return go_on(parsed, parsed.run_directory)
    check_modules(config)
    check_extras(config)
    check_servers(config)
    if parsed.run_directory is not None:
        directory = open_run_directory(parsed.run_directory)
    else:
        directory = make_run_directory(config, datetime.now())
    print(f"run directory: {directory}", flush=True)
    with owned(directory):
        if parsed.dry_run:
            from slime_async.cli.dry_run import shrink

            config = shrink(config, directory)
        config = prepare_model(config, directory)
        code = begin(config, directory, parsed)
    if parsed.dry_run and not code:
        print("the dry run went through: task, model, training and weight updates fit together")
    return code


def resume(parsed: argparse.Namespace) -> int:
    """``--resume RUN``"""
    others = {"--control": parsed.control, "--dry-run": parsed.dry_run, "--run-directory": parsed.run_directory}
    superfluous = (
        [str(parsed.config)] if parsed.config is not None else [name for name, is_set in others.items() if is_set]
    )
    if superfluous:
        raise ConfigError(
            f"--resume {parsed.resume} goes on with that run's own configuration: leave {' and '.join(superfluous)} out"
        )
    return go_on(parsed, parsed.resume)


def go_on(parsed: argparse.Namespace, directory: Path) -> int:
    """Go on with a run; what flags changed is written into its configuration."""
    if parsed.run_directory is not None and is_finished(directory):
        print(f"the run in {directory} has finished: nothing to do", flush=True)
        return 0
    config = resumed_config(directory, overrides(parsed))
    check_modules(config)
    check_extras(config)
    check_servers(config)
    with owned(directory):
        return begin(config, directory, parsed)


def begin(config: Config, directory: Path, parsed: argparse.Namespace) -> int:
    """Start a run, or one more attempt at it, in its own directory, whose ``config.toml`` says that it has begun."""
    forget(directory)
    listen = ""
    if parsed.launcher != "local":
        directory, listen = directory.resolve(), listening_address(config)
        config = with_keys(config, directory)
    if not (directory / "environment.json").exists():
        write_environment(directory)
    write_config(config, directory)
    return train(config, directory, plan_run(config, directory, listen), make_launcher=maker_of(parsed.launcher))


def with_control(config: Config) -> Config:
    """The same run with a control experiment as long as RL. Raises ``ConfigError`` when it has no supervised phase."""
    if not config.warm_start.steps:
        raise ConfigError("--control goes on with the supervised phase, but warm_start.steps = 0: there is none")
    warm_start = config.warm_start.model_copy(update={"control_steps": config.run.steps})
    return config.model_copy(update={"warm_start": warm_start})


def check_modules(config: Config) -> None:
    """Raise ``ConfigError`` for functions in packages that are not installed, before anything starts."""
    missing = [
        f"{key} = {path!r}: there is no module {package}, neither installed nor in {Path.cwd()}"
        for key, path in function_paths(config).items()
        if importlib.util.find_spec(package := path.partition(":")[0].partition(".")[0]) is None
    ]
    if missing:
        raise ConfigError("\n".join(missing))


def check_servers(config: Config) -> None:
    """Raise ``ConfigError`` for SGLang servers that cannot start as configured."""
    if config.actor.engine == "sglang":
        from slime_async.actors.engines import check_engines

        check_engines(config)


def train(
    config: Config,
    directory: Path,
    plan: RunPlan,
    watch: Watch = observe,
    make_launcher: MakeLauncher = make_local,
) -> int:
    """Run a plan to its end, whatever that is; returns the exit code. Writes events and the summary."""
    launcher = make_launcher(config, directory)
    events = EventLog(directory / "events.jsonl")
    events.write("run_started", staleness_bound=config.staleness.max_staleness)
    exit_code, outcome, reason = 0, "finished", ""
    supervisor = Supervisor(launcher, plan, partial(_record, events), partial(asked, directory))
    try:
        stopped_by = asyncio.run(_until_stopped(_supervise(supervisor, partial(watch, config, directory)), supervisor))
        if stopped_by is not None:
            exit_code, outcome, reason = 128 + stopped_by, "interrupted", f"stopped by {stopped_by.name}"
        elif config.warm_start.control_steps:
            evaluate_control(config, directory, events)
    except RunError as failure:
        exit_code, outcome, reason = failure.exit_code, "failed", str(failure)
    events.write("run_finished", outcome=outcome, reason=reason)
    events.close()
    summary = write_summary(directory)
    if outcome != "interrupted":  # who presses Ctrl-C wants to be gone, and can have the report later
        write_views(directory)
    if summary.steps or outcome == "finished":
        print_summary(summary)
    if reason:
        print(f"slime-async: {reason}", file=sys.stderr, flush=True)
    print(f"run directory: {directory}", flush=True)
    return exit_code


def write_views(directory: Path) -> None:
    """The report and the timeline. A disk that is full by now costs these, not the run's result."""
    from slime_async.report.page import write_report
    from slime_async.report.run import read_run
    from slime_async.telemetry.timeline import write_timeline

    try:
        write_report([read_run(directory)], directory / "report.html")
        write_timeline(directory)
    except OSError as error:
        print(f"no report: {error}", file=sys.stderr, flush=True)


def evaluate_control(config: Config, directory: Path, events: EventLog) -> None:
    """The control experiment's accuracy, on the same tasks as the run's own evaluations."""
    from slime_async.cli.eval import evaluate

    checkpoint = directory / "checkpoints" / "supervised_only"
    for source in config.task.evaluation:
        result = evaluate(config, checkpoint, source, config.evaluation.tasks)
        events.write(
            "evaluation",
            name="supervised_only",
            source=source,
            accuracy=result.accuracy,
            tasks=result.tasks,
            failed=result.failed,
        )


def _record(events: EventLog, event: EventName, fields: Mapping[str, Scalar]) -> None:
    events.write(event, **fields)
    print(f"{event.replace('_', ' ')}: {', '.join(f'{key} {value}' for key, value in fields.items())}", flush=True)


async def _until_stopped(work: Coroutine[Any, Any, None], supervisor: Supervisor) -> signal.Signals | None:
    """Run ``work`` until it ends or a signal comes, which is then returned. No process is left in either case."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not stopped.done():
            print(f"{number.name}: stopping all processes", file=sys.stderr, flush=True)
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    working = asyncio.create_task(work)
    awaited: list[asyncio.Future[Any]] = [working, stopped]
    try:
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            return stopped.result()
        await working
        return None
    finally:
        working.cancel()
        await asyncio.wait([working])
        await supervisor.stop()


async def _supervise(supervisor: Supervisor, watch: Callable[[str], Coroutine[Any, Any, None]]) -> None:
    """Start everything, show progress, wait for the end. A view that breaks by a bug of ours is an error."""
    address = await supervisor.start()
    waiting, watching = asyncio.create_task(supervisor.wait()), asyncio.create_task(watch(address))
    try:
        await asyncio.wait({waiting, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            watching.result()
        await waiting
    finally:
        for task in (waiting, watching):
            task.cancel()
        await asyncio.wait({waiting, watching})
