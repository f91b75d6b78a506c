"""What every launcher offers to the supervisor: start a role's command, tell when it ends, stop everything.

==========  ===================  ==================================================  ==========================
launcher    module               a role is                                           keys travel as
==========  ===================  ==================================================  ==========================
local       ``launch_local``     a process of this machine                           files, where they are
slurm       ``launch_slurm``     a step of a heterogeneous job (``srun``)            files of mode 600 in the run
ray         ``launch_ray``       a process below a Ray actor in a placement group    an object of Ray's store
==========  ===================  ==================================================  ==========================

Who is started again, and when a run has failed, is the supervisor's to decide, the same for all three.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Role = Literal["hub", "learner", "actor"]

USER_ERROR = 2
"""Exit code of a process that was asked for something impossible; starting it again would not help"""

CONSEQUENCE = 75
"""Exit code of a process that ends because another one failed: whose failure it was shows soon, by its own exit"""


LEFT = 128 + signal.SIGTERM
"""Exit code of a process that left because it was told to"""


@dataclass(frozen=True, slots=True)
class RoleCommand:
    """One role to run: ``name`` is unique in the run and names its log."""

    name: str
    arguments: tuple[str, ...]
    """Of Python, whose path each machine knows for itself"""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Over the environment of the launcher"""
    ranks: int = 1
    """Processes that do this together, through torchrun when there is more than one"""

    @property
    def role(self) -> Role:
        return role_of(self.name)

    @property
    def place(self) -> str:
        """``actor-1`` for ``actor-1.2``: what all its lives have in common."""
        return place_of(self.name)


class RoleProcess(Protocol):
    """A started role."""

    @property
    def name(self) -> str: ...

    @property
    def log(self) -> Path:
        """Its stdout and stderr"""

    async def wait(self) -> int:
        """Its exit code, negative for the signal that killed it; nothing that it started is left by then."""

    async def leave(self) -> None:
        """Ask it to finish what it does and go; how long that may take is its own to know."""


class Launcher(Protocol):
    """Where roles run. Every started process ends with ``stop``, or with the death of the launcher.

    The hub runs where the launcher does, so that a restarted one is found at its old address.
    """

    async def start(self, command: RoleCommand) -> RoleProcess: ...

    async def stop(self) -> None:
        """End everything that runs: politely, then by force. Returns once nothing is left."""


def role_of(name: str) -> Role:
    """``learner.2`` is the learner in its third life, ``actor-1.1`` actor 1 in its second."""
    if name.startswith("actor-"):
        return "actor"
    return "hub" if place_of(name) == "hub" else "learner"


def place_of(name: str) -> str:
    """A role's name without the number of its life."""
    return name.partition(".")[0]


def torchrun(ranks: int) -> tuple[str, ...]:
    """Arguments of Python before a command of ``ranks`` processes on one machine; none for a single one."""
    if ranks == 1:
        return ()
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def describe_exit(code: int) -> str:
    """``exited with code 3`` or ``was killed by SIGKILL``."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
