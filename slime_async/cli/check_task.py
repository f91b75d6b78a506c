"""``slime-async check-task``: play the episodes of a task on a random engine, and say what would spoil training."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from slime_async.cli.common import add_config_argument, config_of
from slime_async.cli.prepare import prepare_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="with the tiny model and the sample data of slime-async train --dry-run"
    )
    parser.add_argument(
        "--answer",
        metavar="TEXT",
        action="append",
        default=[],
        help="an answer that the engine gives now and then, among random ones, to get further (may be repeated)",
    )


def run(parsed: argparse.Namespace) -> int:
    from slime_async.actors.check import check_task

    config = config_of(parsed)
    with tempfile.TemporaryDirectory() as directory:
        if parsed.dry_run:
            from slime_async.cli.dry_run import shrink

            config = shrink(config, Path(directory), new_tokens=config.sampling.max_new_tokens)
        config = prepare_model(config, Path(directory))
        report = check_task(config, Path(config.model.path), answers=parsed.answer)
    for text in report.errors:
        print(f"error: {text}")
    for text in report.warnings:
        print(f"warning: {text}")
    ends = ", ".join(f"{count} {reason}" for reason, count in sorted(report.finish_reasons.items()))
    mean = sum(report.rewards) / max(1, len(report.rewards))
    print(f"{report.episodes} episodes, {report.turns} turns, mean reward {mean:.3f}; ended by: {ends or 'failures'}")
    print("the task keeps its contract" if not report.errors else f"{len(report.errors)} errors")
    return 1 if report.errors else 0
