"""Real processes, killed with SIGKILL while they write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def kill_many(directory: Path, rounds: int, deadline_s: float) -> None:
    command = [sys.executable, "-m", "tests.journal.killed_hub", str(directory), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{rounds} kills")
    assert len(list(directory.glob("events-*.journal"))) > 1


def test_whatever_was_promised_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    kill_many(tmp_path, rounds=15, deadline_s=110)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_was_promised_before_hundreds_of_kills_is_there_after_them(tmp_path: Path) -> None:
    kill_many(tmp_path, rounds=300, deadline_s=580)
