"""``slime-async train``: hub, actors and learner on this machine, watched until the last step."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from slime_async.cli.common import add_config_argument, config_of
from slime_async.cli.launch_local import LocalLauncher
from slime_async.cli.prepare import prepare_model
from slime_async.cli.progress import watch_hub
from slime_async.cli.roles import plan_run
from slime_async.cli.run_directory import make_run_directory, write_config
from slime_async.cli.summary_table import print_summary
from slime_async.cli.supervise import RunFailed, RunPlan, Supervisor
from slime_async.config import Config, ConfigError
from slime_async.config.checks import function_paths
from slime_async.protocol import Scalar
from slime_async.telemetry.events import EventLog, EventName
from slime_async.telemetry.summary import write_summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser)
    parser.add_argument(
        "--control",
        action="store_true",
        help="also report what as many supervised steps reach without RL (sets warm_start.control-steps to run.steps)",
    )


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    if parsed.control:
        if not config.warm_start.steps:
            raise ConfigError("--control goes on with the supervised phase, but warm_start.steps = 0: there is none")
        warm_start = config.warm_start.model_copy(update={"control_steps": config.run.steps})
        config = config.model_copy(update={"warm_start": warm_start})
    check_modules(config)
    directory = make_run_directory(config, datetime.now())
    print(f"writing to {directory}", flush=True)
    config = prepare_model(config, directory)
    write_config(config, directory)
    return train(config, directory, plan_run(config, directory))


def check_modules(config: Config) -> None:
    """Raise ``ConfigError`` for functions in packages that are not installed, before anything starts."""
    missing = [
        f"{key} = {path!r}: there is no module {package}, neither installed nor in {Path.cwd()}"
        for key, path in function_paths(config).items()
        if importlib.util.find_spec(package := path.partition(":")[0].partition(".")[0]) is None
    ]
    if missing:
        raise ConfigError("\n".join(missing))


def train(config: Config, directory: Path, plan: RunPlan) -> int:
    """Run a plan to its end, whatever that is; returns the exit code. Writes events and the summary."""
    events = EventLog(directory / "events.jsonl")
    events.write("run_started", staleness_bound=config.staleness.max_staleness)
    exit_code, outcome, reason = 0, "finished", ""
    try:
        stopped_by = asyncio.run(_supervise(config, directory, plan, events))
        if stopped_by is not None:
            exit_code, outcome, reason = 128 + stopped_by, "interrupted", f"stopped by {stopped_by.name}"
        elif config.warm_start.control_steps:
            evaluate_control(config, directory, events)
    except RunFailed as failure:
        exit_code, outcome, reason = failure.exit_code, "failed", str(failure)
    events.write("run_finished", outcome=outcome, reason=reason)
    events.close()
    print_summary(write_summary(directory))
    if reason:
        print(f"slime-async: {reason}", file=sys.stderr, flush=True)
    print(f"run directory: {directory}", flush=True)
    return exit_code


def evaluate_control(config: Config, directory: Path, events: EventLog) -> None:
    """The control experiment's accuracy, on the same tasks as the run's own evaluations."""
    from slime_async.cli.eval import evaluate

    checkpoint = directory / "checkpoints" / "supervised_only"
    for source in config.task.evaluation:
        print(f"evaluating the supervised control on {source}", flush=True)
        result = evaluate(config, checkpoint, source, config.evaluation.tasks)
        events.write(
            "evaluation",
            name="supervised_only",
            source=source,
            accuracy=result.accuracy,
            tasks=result.tasks,
            failed=result.failed,
        )


async def _supervise(config: Config, directory: Path, plan: RunPlan, events: EventLog) -> signal.Signals | None:
    """Until the run is done, or a signal stops it: then that signal. Nothing is left running in either case."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not stopped.done():
            print(f"{number.name}: stopping", file=sys.stderr, flush=True)
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)

    def record(event: EventName, fields: Mapping[str, Scalar]) -> None:
        events.write(event, **fields)
        print(f"{event.replace('_', ' ')}: {', '.join(f'{k} {v}' for k, v in fields.items())}", flush=True)

    supervisor = Supervisor(LocalLauncher(directory / "logs"), plan, record)
    running = asyncio.create_task(_run_and_watch(supervisor, config), name="run")
    try:
        either: set[asyncio.Future[Any]] = {running, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
            return None
        return stopped.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await supervisor.stop()


async def _run_and_watch(supervisor: Supervisor, config: Config) -> None:
    """Start everything and wait for its end; meanwhile a line every few seconds says how it goes."""
    address = await supervisor.start()
    watching = asyncio.create_task(watch_hub(address, config), name="progress")
    try:
        await supervisor.wait()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
