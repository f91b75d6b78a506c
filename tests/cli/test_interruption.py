"""Ctrl-C, SIGTERM and kill -9 of the launcher: nothing stays behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import standins

from slime_async.cli import launch_local

NAMES = {"hub", "actor-0", "actor-0.child", "learner"}
STOP_S = 5.0


@contextmanager
def launcher(run: Path, learner: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher of stand-ins in a process of its own, killed at the end if the test did not."""
    command = [sys.executable, standins.__file__, str(run), learner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_stopping_by_force_fits_into_five_seconds() -> None:
    assert launch_local.TERM_GRACE_S + launch_local.KILL_WAIT_S < STOP_S


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"])
def test_a_signal_stops_every_process_even_those_that_ignore_it(tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run"
    learner, names = ("stubborn", NAMES) if code == 130 else ("torchrun", NAMES | {"learner.rank"})
    with launcher(run, learner) as process:
        pids = standins.recorded(run, names)
        process.send_signal(number)
        output, errors = process.communicate(timeout=standins.DEADLINE_S)
    assert process.returncode == code, errors
    standins.wait_until_dead(pids)
    assert output.splitlines()[-1] == f"run directory: {run}"
    assert json.loads((run / "summary.json").read_text())["outcome"] == "interrupted"


@pytest.mark.parametrize("learner", ["torchrun", "stubborn"])
def test_kill_9_of_the_launcher_leaves_no_orphan(tmp_path: Path, learner: str) -> None:
    run = tmp_path / "run"
    names = NAMES | ({"learner.rank"} if learner == "torchrun" else set())
    with launcher(run, learner) as process:
        pids = standins.recorded(run, names)
        process.kill()
        process.wait(standins.DEADLINE_S)
    standins.wait_until_dead(pids)
