"""Processes that never outlive the one that started them, not even when that one dies of ``kill -9``.

Two ways in, for the same promise::

    python -m slime_async.guard PARENT_PID -- COMMAND …     for any command: arms itself, then becomes COMMAND
    die_with_parent()                                       for our own processes, whoever started them

The kernel signals the death of the *thread* that started a process: start guarded processes from a thread that lives
as long as the process should.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; the setting survives exec, and is cleared in children"""
GUARDED = "SLIME_ASYNC_GUARDED"
"""Environment variable that a launcher sets: processes below it, at any depth, shall call ``die_with_parent``"""
WATCH_INTERVAL_S = 0.5
"""How late an orphan may notice where the kernel does not tell it"""


def die_with_parent() -> None:
    """From now on this process gets SIGKILL when its parent dies; leaves at once if that happened already.

    Linux tells by signal. A thread looks as well: elsewhere there is no such signal, and a parent that is replaced by
    a subreaper does not raise it.
    """
    parent = os.getppid()
    arm()
    if os.getppid() != parent or parent == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def arm() -> None:
    """Ask the kernel for SIGKILL at the parent's death, where it can (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # no libc to call, as with some static builds: the watch remains
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGKILL)


def guarded(command: Sequence[str]) -> tuple[str, ...]:
    """``command`` so that it dies with the process that calls this."""
    return (sys.executable, "-m", "slime_async.guard", str(os.getpid()), "--", *command)


def main(arguments: Sequence[str]) -> None:
    """Become the command, unless the parent is gone by now."""
    parent, separator, *command = arguments
    if separator != "--" or not command:
        raise SystemExit("usage: python -m slime_async.guard PARENT_PID -- COMMAND …")
    arm()
    if os.getppid() != int(parent):
        raise SystemExit(f"the parent {parent} died before {command[0]} started")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
