"""``slime-async report``: a run, or several against each other, as one HTML file; of one, its timeline, too."""

from __future__ import annotations

import argparse
from pathlib import Path

from slime_async.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory, finished or in progress")
    parser.add_argument("--output", metavar="FILE", type=Path, help="[RUN/report.html; of several runs ./report.html]")

    parser.add_argument(
        "--timeline", metavar="FILE", type=Path, help="of a single run, for Perfetto [RUN/timeline.json]"
    )


def run(parsed: argparse.Namespace) -> int:
    from slime_async.report.page import write_report
    from slime_async.report.run import read_runs
    from slime_async.telemetry.timeline import write_timeline

    try:
        runs = read_runs(parsed.runs)
    except FileNotFoundError as missing:
        raise ConfigError(str(missing)) from None
    output = parsed.output or (parsed.runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_report(runs, output)
    print(output)
    if len(runs) == 1:
        problems: list[str] = []
        print(write_timeline(parsed.runs[0], parsed.timeline, problems.append))
    return 0
