"""The end of a subprocess: killed, reaped, and its pipes closed while the event loop still runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import Process

PIPES_TIMEOUT_S = 1.0
"""For the pipes of a dead process to close by themselves"""


async def end_process(process: Process, *, group: bool = False) -> int:
    """Kill it (with ``group`` everything in its process group) and return its exit code, −n for signal n."""
    with contextlib.suppress(ProcessLookupError):  # not Process.kill: that may reap it, and its exit code be lost
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.returncode is None:
            os.kill(process.pid, signal.SIGKILL)
    await asyncio.shield(_reap(process))
    assert process.returncode is not None
    return process.returncode


async def _reap(process: Process) -> None:
    """asyncio takes a process for ended when its pipes are closed, too: one that somebody else still holds, or that is
    full and that nobody reads, never closes by itself, and there is no public way to close it."""
    try:
        async with asyncio.timeout(PIPES_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process._transport.close()  # type: ignore[attr-defined]
        await process.wait()
    process._transport.close()  # type: ignore[attr-defined]
    await asyncio.sleep(0)  # the pipes' own closing is one turn of the loop away
