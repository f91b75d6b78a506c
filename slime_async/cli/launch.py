"""What every launcher offers to the supervisor: start a role's command, tell when it ends, stop everything."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

USER_ERROR = 2
"""Exit code of a process that was asked for something impossible; starting it again would not help"""

CONSEQUENCE = 75
"""Exit code of a process that ends because another one failed: whose failure it was shows soon, by its own exit"""


@dataclass(frozen=True, slots=True)
class RoleCommand:
    """One process to run: ``name`` is unique in the run and names its log."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Over the environment of the launcher"""


class RoleProcess(Protocol):
    """A started role."""

    @property
    def name(self) -> str: ...

    @property
    def log(self) -> Path:
        """Its stdout and stderr"""

    async def wait(self) -> int:
        """Its exit code, negative for the signal that killed it; nothing that it started is left by then."""


class Launcher(Protocol):
    """Where roles run. Every started process ends with ``stop``, or with the death of the launcher."""

    async def start(self, command: RoleCommand) -> RoleProcess: ...

    async def stop(self) -> None:
        """End everything that runs: politely, then by force. Returns once nothing is left."""


def describe_exit(code: int) -> str:
    """``exited with code 3`` or ``was killed by SIGKILL``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
