"""``slime-async audit``: proof, from what a run wrote down, that nothing was lost and nothing trained twice.

Every trajectory that the hub accepted was trained exactly once in the lineage of the present weights, or dropped for a
known reason, or is still on its way; each batch is held against the learner's own metrics. Reads only, so it can be
run beside a run that goes on. Exit codes: 0 clean; 1 not clean, with the trajectories concerned, or the journal is
damaged; 2 there is no journal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slime_async.cli.run_directory import JOURNAL
from slime_async.config import ConfigError
from slime_async.telemetry.jsonl import read_jsonl
from slime_async.telemetry.metrics import read_metrics

NOT_CLEAN = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's directory")


def run(parsed: argparse.Namespace) -> int:
    from slime_async.audit import audit
    from slime_async.transport.journal import JournalError, read_trail

    journal = parsed.run / JOURNAL
    if not journal.is_dir():
        raise ConfigError(f"{parsed.run} has no {JOURNAL}/: only a run with a journal can be audited")
    finished = has_finished(parsed.run)
    steps = list(read_metrics(parsed.run / "metrics.jsonl"))  # before the trail: of a run that goes on, it has less
    try:
        report = audit(read_trail(journal), steps, finished)
    except JournalError as error:
        print(f"slime-async: {error}", file=sys.stderr)
        return NOT_CLEAN
    for line in report.lines():
        print(line)
    return 0 if report.clean else NOT_CLEAN


def has_finished(run: Path) -> bool:
    """Whether the last thing that the launcher wrote is that the run finished; a resumed run goes on."""
    outcomes = [
        line.get("outcome")
        for line in read_jsonl(run / "events.jsonl")
        if line["event"] in ("run_started", "run_finished")
    ]
    return bool(outcomes) and outcomes[-1] == "finished"
