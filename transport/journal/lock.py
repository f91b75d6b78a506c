"""One process per journal: an advisory lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from slime_async.transport.journal.errors import JournalInUse


class DirectoryLock:
    """Held from its making until ``close``. Raises ``JournalInUse`` when another process, or this one, holds it."""

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._descriptor, 64, 0).decode("ascii", "replace") or "unknown"
            os.close(self._descriptor)
            remedy = "a journal has one hub; stop that one first, or start a run of its own"
            raise JournalInUse(path, f"process {holder} has this journal open", remedy) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        os.close(self._descriptor)
