"""Roles as processes of this machine, each in a session of its own, none of them outliving this process.

Ctrl-C of a terminal reaches the launcher alone, which then stops its children; ``kill -9`` of the launcher kills them
through ``slime_async.guard``. What a child started and left behind goes with the child's process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from slime_async.cli.launcher import RoleCommand, torchrun
from slime_async.guard import GUARDED, guarded

TERM_GRACE_S = 2.0
"""Between SIGTERM and SIGKILL; with KILL_WAIT_S below the 5 s in which a run must stop"""
KILL_WAIT_S = 1.5
"""How long the kernel may take to bury what was killed"""


class LocalProcess:
    """One child, and everything in its process group."""

    def __init__(self, name: str, log: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.log = log
        self._process = process
        self._exit = asyncio.create_task(self._bury(), name=f"wait for {name}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._exit.done()

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    async def leave(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)  # itself, not what it started and still needs

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group, which may be gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def _bury(self) -> int:
        code = await self._process.wait()
        self.signal(signal.SIGKILL)  # what it started itself and left behind
        return code


class LocalLauncher:
    """Starts roles on this machine; logs go to ``log_directory/NAME.log``."""

    def __init__(self, log_directory: Path) -> None:
        self._log_directory = log_directory
        self._processes: list[LocalProcess] = []

    async def start(self, command: RoleCommand) -> LocalProcess:
        """Start one role. Must be called from the main thread: children die with the thread that started them."""
        return await self.run(command, (sys.executable, *torchrun(command.ranks), *command.arguments))

    async def run(self, command: RoleCommand, argv: Sequence[str]) -> LocalProcess:
        """Start ``argv`` in the role's name and environment."""
        self._log_directory.mkdir(parents=True, exist_ok=True)
        log = self._log_directory / f"{command.name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *guarded(argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", GUARDED: "1", **command.environment},
                start_new_session=True,
            )
        started = LocalProcess(command.name, log, process)
        self._processes.append(started)
        return started

    async def stop(self) -> None:
        """SIGTERM to all, SIGKILL to those that are still there after ``TERM_GRACE_S``."""
        for number, patience_s in ((signal.SIGTERM, TERM_GRACE_S), (signal.SIGKILL, KILL_WAIT_S)):
            self._processes = [process for process in self._processes if not process.ended]
            for process in self._processes:
                process.signal(number)
            if self._processes:
                await asyncio.wait([asyncio.create_task(p.wait()) for p in self._processes], timeout=patience_s)
        self._processes = [process for process in self._processes if not process.ended]
        if self._processes:
            stuck = ", ".join(f"{process.name} (pid {process.pid})" for process in self._processes)
            raise RuntimeError(f"{stuck} did not end on SIGKILL: stuck in a driver or a file system?")
