"""What this process tells of itself: who it is, where it runs, its latest numbers and its last warning.

Heartbeats carry it to the hub (``slime-async top`` shows it), the Prometheus endpoint serves it, log lines are marked
with it. There is one per process, as there is one logging configuration; a process that has not begun a role (a test, a
tool) tells nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from slime_async import __version__
from slime_async.protocol import Report, Scalar

WARNING_LENGTH = 300
"""Characters of a warning that go with every heartbeat"""


@dataclass(slots=True)
class Process:
    """One role's process. Numbers may be told and read by different threads."""

    role: str = ""
    name: str = ""
    host: str = field(default_factory=socket.gethostname)
    _numbers: dict[str, Mapping[str, Scalar]] = field(default_factory=dict)
    _warnings: int = 0
    _last_warning: str = ""
    _warned_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, role: str, name: str) -> None:
        """From now on this is a role's process."""
        self.role, self.name = role, name

    def tell(self, source: str, numbers: Mapping[str, Scalar]) -> None:
        """The latest numbers of one source, in place of those before."""
        with self._lock:
            self._numbers[source] = dict(numbers)

    def warned(self, text: str) -> None:
        """A warning or an error was logged."""
        with self._lock:
            self._warnings += 1
            self._last_warning, self._warned_s = text[:WARNING_LENGTH], time.monotonic()

    def numbers(self) -> dict[str, Scalar]:
        """All that was told, as of now."""
        with self._lock:
            return {name: value for numbers in self._numbers.values() for name, value in numbers.items()}

    @property
    def warnings(self) -> int:
        return self._warnings

    def about(self) -> Report:
        """For heartbeats; empty where no role has begun."""
        if not self.role:
            return {}
        report: Report = {
            "host": self.host,
            "pid": os.getpid(),
            "release": __version__,
            "warnings": self._warnings,
        }
        with self._lock:
            if self._last_warning:
                report |= {"last_warning": self._last_warning, "last_warning_s": time.monotonic() - self._warned_s}
        return report


PROCESS = Process()
"""This one"""
