"""Kills the processes of one run from outside, role by role, each again once the run has moved on."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from slime_async.cli.supervise import Role
from slime_async.telemetry.jsonl import read_jsonl

ROLES: tuple[Role, ...] = ("hub", "actor", "learner")
POLL_S = 0.2
CALM_STEPS = 2
"""Batches trained between two kills: a run that is only ever killed proves nothing"""


@dataclass(frozen=True, slots=True)
class Kill:
    """One process killed from outside."""

    role: Role
    time_s: float
    """Of the wall clock, as events have it"""


@dataclass
class Killer:
    """``seconds`` of kills, at least ``least`` of each role; then the run is left alone."""

    run: Path
    seconds: float
    least: int
    seed: int
    may_strike: Callable[[Role], bool] = lambda _role: True
    """Not yet, while a life is still aimed at"""
    kills: list[Kill] = field(default_factory=list)

    async def strike(self) -> None:
        """*Waits for* trained batches; *ends* when it has killed enough, or is cancelled with the run."""
        chance = random.Random(self.seed)
        await self._calm()
        begun = time.monotonic()
        while time.monotonic() - begun < self.seconds or self._missing():
            open_to = [role for role in self._missing() or ROLES if self.may_strike(role)]
            role = chance.choice(open_to) if open_to else None
            await asyncio.sleep(chance.uniform(0.0, 1.0))  # anywhere in a step, not only at its end
            if role is not None and (pids := list(processes(self.run, role))):
                os.kill(chance.choice(pids), signal.SIGKILL)
                self.kills.append(Kill(role, time.time()))
                print(f"chaos: killed {role} ({len(self.kills)})", flush=True)
            await self._calm()
        print(f"chaos: over after {len(self.kills)} kills", flush=True)

    def _missing(self) -> list[Role]:
        struck = Counter(kill.role for kill in self.kills)
        return [role for role in ROLES if struck[role] < self.least]

    async def _calm(self) -> None:
        trained = self._trained()
        while self._trained() < trained + CALM_STEPS:
            await asyncio.sleep(POLL_S)

    def _trained(self) -> int:
        """Lines of metrics: batches trained, those trained again included."""
        return sum(line.get("phase") == "rl" for line in read_jsonl(self.run / "metrics.jsonl"))


def processes(run: Path, role: Role) -> Iterator[int]:
    """The living processes of a role in this run."""
    wanted = f" {role} {run / 'config.toml'} "
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if wanted in command:
                yield int(entry.name)
