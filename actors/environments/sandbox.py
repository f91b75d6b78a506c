"""Python that a model wrote, in a process of its own: limits of time, memory, files and output.

It keeps accidents (endless loops, memory, files left behind) from an actor. It is no wall against someone who wants
out: the process has the actor's user and, unless the machine takes it away, its network. Run actors in containers when
answers may be hostile.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import STDOUT
from dataclasses import dataclass
from pathlib import Path

from slime_async.actors.isolation.ending import end_process

RUNNER = """
import resource, sys
seconds, memory, size = map(int, sys.argv[1:])
for limit, value in (
    (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, size),
    (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
exec(compile(sys.stdin.read(), "answer", "exec"), {"__name__": "__main__"})
"""
"""Sets its own limits, then becomes the code that it reads."""
OUTPUT_BYTES = 64 << 10
"""Read at most"""
FILE_BYTES = 1 << 20
"""What any of its files may hold, its output among them"""


@dataclass(frozen=True, slots=True)
class Execution:
    """What came of one piece of code."""

    output: str
    """Standard output and error, as far as they were read"""
    status: str
    """``ok``, ``error`` (it raised, or ended by itself otherwise), ``timeout``, ``too_much_output``, ``killed``"""


async def run_python(
    source: str, *, timeout_s: float = 5.0, memory_bytes: int = 512 << 20, output_bytes: int = OUTPUT_BYTES
) -> Execution:
    """Run ``source`` in a fresh interpreter, without packages of the environment, in an empty folder that is deleted.

    Nothing it starts survives: all of its process group is killed at the end. Its output goes to a file, so nobody can
    keep the actor waiting by holding a pipe open.
    """
    with tempfile.TemporaryDirectory(prefix="sandbox-") as outer:
        code, said, folder = Path(outer, "code.py"), Path(outer, "output"), Path(outer, "work")
        code.write_text(source, encoding="utf-8", errors="replace")
        folder.mkdir()
        limits = (max(1, round(timeout_s)), memory_bytes, max(FILE_BYTES, output_bytes + 1))
        with code.open("rb") as stdin, said.open("wb") as stdout:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", "-c", RUNNER, *map(str, limits)),
                stdin=stdin,
                stdout=stdout,
                stderr=STDOUT,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": str(folder), "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        status = ""
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            status = "timeout"
        finally:
            ended = await end_process(process, group=True)
        with said.open("rb") as output:
            read = output.read(output_bytes + 1)
    if len(read) > output_bytes:
        status = "too_much_output"
    return Execution(read[:output_bytes].decode(errors="replace"), status or _ended(ended))


def _ended(code: int) -> str:
    if code == 0:
        return "ok"
    return "killed" if code < 0 else "error"
