"""One worker process, as the actor sees it: one call at a time, each with a deadline, none of which can hurt the actor.

::

    call ──► lock ──► pipe ──► child runs it ──► pipe ──► result
              │                   │ too long, too much memory, a crash, or the caller went away
              │                   └──► killed; WorkerError(reason); the next call starts a new process
"""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from typing import Any

from slime_async.actors.isolation.ending import end_process
from slime_async.actors.isolation.frames import LENGTH, MAX_FRAME_BYTES, pack, unpack

START_TIMEOUT_S = 60.0
"""For a Python interpreter to come up on a busy machine"""
GOING_TIMEOUT_S = 5.0
"""For a process to end by itself after it closed its pipe, so that its exit code can be told"""
CHILD = ("-m", "slime_async.actors.isolation.child")


class WorkerError(RuntimeError):
    """A call in a worker process came to nothing.

    ``reason`` is what failures are counted by: ``timeout``, ``memory``, ``died``, or the class of what the function
    raised.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WorkerProcess:
    """Starts its process with the first call, and again with the first one after a death."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self.lives = 0
        """Processes started so far; objects belong to one of them"""
        self.pending = 0
        """Calls that run or wait"""
        self.objects = 0
        """Opened here and not closed"""

    async def exchange(self, call: dict[str, Any], timeout_s: float, life: int | None = None) -> Any:
        """The result of one call. ``timeout_s`` counts from its own start, not from its place in the queue.

        With ``life`` it must run in that process. Raises ``WorkerError``; ``TypeError`` for arguments that are no plain
        data. When the caller is cancelled, the process is killed: nobody would read its answer.
        """
        frame = pack(call)
        self.pending += 1
        try:
            async with self._lock:
                if life is not None and (life != self.lives or not self.alive):
                    raise WorkerError("died", "the worker process that held this environment is gone")
                process = await self._start()
                try:
                    reply = await asyncio.wait_for(_exchange(process, frame), timeout_s)
                except TimeoutError:
                    await self.kill()
                    raise WorkerError("timeout", f"{_name(call)} took longer than {timeout_s:g} s") from None
                except (EOFError, ConnectionError):
                    raise WorkerError("died", f"{_name(call)}: {await self._obituary()}") from None
                except BaseException:
                    await self.kill()
                    raise
        finally:
            self.pending -= 1
        return await self._result(call, reply)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def kill(self) -> None:
        """End the process, whatever it does; returns when it is gone."""
        process, self._process = self._process, None
        if process is not None:
            self.objects = 0
            await end_process(process)

    async def _start(self) -> Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        await self.kill()
        self.lives += 1
        self._process = process = await asyncio.create_subprocess_exec(sys.executable, *CHILD, stdin=PIPE, stdout=PIPE)
        setup = {"path": sys.path, "memory_bytes": self._memory_bytes}
        try:
            await asyncio.wait_for(_exchange(process, pack(setup)), START_TIMEOUT_S)
        except (TimeoutError, EOFError, ConnectionError) as error:
            raise WorkerError("died", f"a worker process did not start: {await self._obituary()}") from error
        except BaseException:
            await self.kill()
            raise
        return process

    async def _obituary(self) -> str:
        """What its process died of; it has closed its pipe, and may still be about to go."""
        process, self._process = self._process, None
        assert process is not None
        self.objects = 0
        try:
            async with asyncio.timeout(GOING_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            pass  # it closed its pipe and lives on
        code = await end_process(process)
        if code >= 0:
            return f"its process ended with exit code {code}"
        return f"its process was ended by {signal.Signals(-code).name}"

    async def _result(self, call: dict[str, Any], reply: dict[str, Any]) -> Any:
        if "error" not in reply:
            return reply["ok"]
        if reply["error"] == "MemoryError":
            await self.kill()  # what is left of it may not be enough for the next call
            raise WorkerError(
                "memory", f"{_name(call)} needed more than task.process_memory_bytes = {self._memory_bytes}"
            )
        error = WorkerError(reply["error"], f"{_name(call)} raised {reply['error']}: {reply['text']}")
        error.add_note(reply["trace"])
        raise error


async def _exchange(process: Process, frame: bytes) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(frame)
    await process.stdin.drain()
    try:
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise EOFError(f"announces {length} bytes")
        return unpack(await process.stdout.readexactly(length))
    except asyncio.IncompleteReadError as error:
        raise EOFError("the worker closed its pipe") from error


def _name(call: dict[str, Any]) -> str:
    return str(call.get("target") or call.get("name") or call["op"])
