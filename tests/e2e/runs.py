"""Runs of the real command in real processes, small enough for a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo.toml"
TIMEOUT_S = 200.0
"""For anything that a run is waited for; a healthy one takes a fraction of it"""

TINY = {
    "run.log-interval-s": "1",
    "warm_start.steps": "10",
    "warm_start.batch-size": "16",
    "batch.groups": "4",
    "batch.group-size": "4",
    "actor.slots": "16",
    "evaluation.tasks": "16",
    "hub.heartbeat-interval-s": "0.3",
    "hub.heartbeat-timeout-s": "3",
}
"""Over the demo's configuration"""


def flags(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]


@dataclass
class Run:
    """``slime-async train`` in the background."""

    process: subprocess.Popen[str]
    directory: Path
    """Where run directories are made"""

    @property
    def path(self) -> Path:
        [path] = self.directory.iterdir()
        return path

    def steps(self) -> list[dict[str, Any]]:
        return _lines(self.path / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        return _lines(self.path / "events.jsonl")

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        return summary

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not self._holds(ready):
            assert self.process.poll() is None, f"ended while waiting for {what}:\n{self.finish()[1]}"
            assert time.monotonic() < deadline, f"no {what} within {TIMEOUT_S} s"
            time.sleep(0.05)

    def _holds(self, ready: Callable[[], bool]) -> bool:
        try:
            return ready()
        except (ValueError, FileNotFoundError, StopIteration):  # its directory is not made yet
            return False

    def finish(self) -> tuple[int, str]:
        """Exit code, and everything it printed."""
        output, _ = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, output

    def pids(self, role: str = "") -> list[int]:
        """Living processes of this run, of one role or of all."""
        return [pid for pid, command in _processes() if str(self.directory) in command and f"main {role}" in command]

    def wait_until_gone(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while left := self.pids():
            assert time.monotonic() < deadline, f"still there after {timeout_s} s: {left}"
            time.sleep(0.05)


@contextmanager
def started(directory: Path, settings: dict[str, str], command: str = "train") -> Iterator[Run]:
    """Start a run; whatever is left of it is killed at the end."""
    argv = [sys.executable, "-m", "slime_async.cli.main", command, str(DEMO)]
    argv += flags({**TINY, "run.directory": str(directory), **settings})
    process = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    run = Run(process, directory)
    try:
        yield run
    finally:
        if process.poll() is None:
            process.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait(TIMEOUT_S)
        for pid in run.pids():
            os.kill(pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                yield int(entry.name), command


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
