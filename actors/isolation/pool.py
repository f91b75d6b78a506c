"""Worker processes of one actor: single calls go to whoever is free, objects stay in the process that made them.

score = await pool.call("my_task:slow_verifier", answer)          # or the function itself
async with pool.open(FrozenLake, seed=3) as game:                  # an environment with state
    observation = await game.call("step", "left")
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

from slime_async.actors.isolation.worker import WorkerError, WorkerProcess

CLOSE_TIMEOUT_S = 5.0
"""For an object's ``close`` when an episode has ended; a worker that does not answer is killed"""


class Remote:
    """An object in a worker process."""

    def __init__(self, worker: WorkerProcess, life: int, number: int, timeout_s: float) -> None:
        self._worker = worker
        self._life = life
        self._number = number
        self._timeout_s = timeout_s

    async def call(self, name: str, /, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        """What its method returns. Raises ``WorkerError``: after ``timeout``, ``memory`` or ``died`` the object, and
        any other in the same process, is gone."""
        request = {"op": "method", "id": self._number, "name": name, "args": args, "kwargs": kwargs}
        return await self._worker.exchange(request, timeout_s or self._timeout_s, self._life)

    async def close(self) -> None:
        """Its ``close`` is called, if it has one."""
        self._worker.objects = max(0, self._worker.objects - 1)
        request = {"op": "close", "id": self._number, "args": (), "kwargs": {}}
        with contextlib.suppress(WorkerError):  # the episode is over, and whatever was to be freed is gone
            await self._worker.exchange(request, CLOSE_TIMEOUT_S, self._life)


class WorkerPool:
    """Starts no process before it is used."""

    def __init__(self, size: int, *, memory_bytes: int = 0, timeout_s: float = 60.0) -> None:
        """``memory_bytes`` bounds the address space of each process; 0 does not."""
        self._workers = [WorkerProcess(memory_bytes) for _ in range(size)]
        self._timeout_s = timeout_s
        self._numbers = itertools.count()

    async def call(
        self, function: Callable[..., Any] | str, /, *args: Any, timeout_s: float | None = None, **kwargs: Any
    ) -> Any:
        """``function(*args, **kwargs)`` in a worker; arguments and result are plain data.

        Raises ``WorkerError``; ``ValueError`` for a function that no other process could import.
        """
        worker = min(self._workers, key=lambda w: (w.pending, w.objects))
        request = {"op": "call", "target": import_path(function), "args": args, "kwargs": kwargs}
        return await worker.exchange(request, timeout_s or self._timeout_s)

    @contextlib.asynccontextmanager
    async def open(
        self, factory: Callable[..., Any] | str, /, *args: Any, timeout_s: float | None = None, **kwargs: Any
    ) -> AsyncIterator[Remote]:
        """An object that ``factory`` makes in a worker, until the block ends. It shares its process with others."""
        timeout_s = timeout_s or self._timeout_s
        worker, number = min(self._workers, key=lambda w: (w.objects, w.pending)), next(self._numbers)
        worker.objects += 1
        request = {"op": "open", "id": number, "target": import_path(factory), "args": args, "kwargs": kwargs}
        try:
            await worker.exchange(request, timeout_s)
        except BaseException:
            worker.objects = max(0, worker.objects - 1)
            raise
        remote = Remote(worker, worker.lives, number, timeout_s)
        try:
            yield remote
        finally:
            await remote.close()

    @property
    def processes(self) -> int:
        """That run now"""
        return sum(worker.alive for worker in self._workers)

    async def close(self) -> None:
        """Kill all of them."""
        await asyncio.gather(*(worker.kill() for worker in self._workers))


def import_path(function: Callable[..., Any] | str) -> str:
    """``module:name`` of a function or class of some module. Raises ``ValueError`` for a lambda or a closure."""
    if isinstance(function, str):
        return function
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or "<" in name or not name:
        raise ValueError(f"{function!r} cannot run in a worker process: it must be a module's function or class")
    return f"{module}:{name}"
