"""Keeps the processes of one run alive, or ends all of them: who may die, who is started again, and what is said.

===========  =========================  =======================================================================
who leaves   cleanly (code 0)           otherwise
===========  =========================  =======================================================================
learner      the run is finished        the run failed
hub          the learner must follow    the run failed
actor        the learner must follow    started again under a new name, ``max_restarts`` times in all; then, or at
                                        once when it says that the user must change something, the run failed
===========  =========================  =======================================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slime_async.cli.launch import CONSEQUENCE, USER_ERROR, Launcher, RoleCommand, RoleProcess, describe_exit
from slime_async.logs import log_tail
from slime_async.protocol import Scalar
from slime_async.telemetry.events import EventName

HUB_START_TIMEOUT_S = 60.0
"""Python and ZeroMQ come up in a second or two; more means a very slow disk"""
READY_POLL_S = 0.05
FOLLOW_TIMEOUT_S = 60.0
"""From the first clean exit to the learner's, which may still write a checkpoint"""
CAUSE_TIMEOUT_S = 10.0
"""From the first exit that was another's fault until that other must have exited as well"""
LEAVE_TIMEOUT_S = 10.0
"""From the learner's clean exit until hub and actors are stopped by signal"""
AFTERMATH_S = 0.5
"""After a failure, to see who fell with it"""


class RunError(Exception):
    """The run ended without its result. The text says who died, how, and the end of its log."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The commands of one run; later ones need the hub's address."""

    hub: RoleCommand
    ready_file: Path
    """The hub writes its address here once it listens"""
    learner: Callable[[str], RoleCommand]
    """(address)"""
    actor: Callable[[str, str], RoleCommand]
    """(address, name)"""
    actors: int
    max_restarts: int


class Supervisor:
    """Runs one plan to its end.

    *consumes* exits of processes; *produces* restarts, and the end of everything; *waits for* the learner.
    """

    def __init__(
        self,
        launcher: Launcher,
        plan: RunPlan,
        on_event: Callable[[EventName, Mapping[str, Scalar]], None],
    ) -> None:
        self._launcher = launcher
        self._plan = plan
        self._on_event = on_event
        self._exits: dict[asyncio.Task[int], RoleProcess] = {}
        self._lives: dict[str, int] = {}
        self._restarts = 0
        self.address = ""

    async def start(self) -> str:
        """Start everything; returns the hub's address. Raises ``RunError`` when the hub does not come up."""
        await self._start(self._plan.hub)
        self.address = await self._hub_address()
        for index in range(self._plan.actors):
            await self._start(self._plan.actor(self.address, f"actor-{index}"))
        await self._start(self._plan.learner(self.address))
        return self.address

    async def wait(self) -> None:
        """Until the learner is done and the others have left. Raises ``RunError``; call ``stop`` in any case."""
        deadline: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            patience = None if deadline is None else max(0.0, deadline - loop.time())
            done, _ = await asyncio.wait(self._exits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise RunError("the others left, but the learner is still there: stopping it")
            for task in sorted(done, key=lambda task: _rank(self._exits[task].name)):
                process, code = self._exits.pop(task), task.result()
                if code == CONSEQUENCE:
                    deadline = deadline or loop.time() + CAUSE_TIMEOUT_S
                elif code:
                    await self._survive(process, code)
                elif process.name == "learner":
                    await self._farewell()
                    return
                else:
                    deadline = deadline or loop.time() + FOLLOW_TIMEOUT_S

    async def stop(self) -> None:
        """End whatever still runs."""
        await self._launcher.stop()
        for task in self._exits:
            task.cancel()

    async def _start(self, command: RoleCommand) -> None:
        process = await self._launcher.start(command)
        self._exits[asyncio.create_task(process.wait(), name=f"exit of {command.name}")] = process

    async def _hub_address(self) -> str:
        [(exit_, hub)] = self._exits.items()
        try:
            async with asyncio.timeout(HUB_START_TIMEOUT_S):
                while not self._plan.ready_file.exists():
                    if exit_.done():
                        del self._exits[exit_]
                        raise self._failure(hub, exit_.result())
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            text = f"the hub does not listen after {HUB_START_TIMEOUT_S:g} s"
            raise RunError(_with_log(text, hub.log)) from None
        return self._plan.ready_file.read_text().strip()

    async def _survive(self, process: RoleProcess, code: int) -> None:
        """Start a dead actor again, or raise ``RunError``."""
        is_actor = process.name.startswith("actor-")
        if not is_actor or code == USER_ERROR:
            if self._exits:
                await asyncio.wait(self._exits, timeout=AFTERMATH_S, return_when=asyncio.ALL_COMPLETED)
            raise self._failure(process, code)
        self._on_event("actor_died", {"actor": process.name, "exit_code": code})
        if self._restarts == self._plan.max_restarts:
            raise self._failure(process, code, f", and all {self._restarts} of actor.max_restarts are used up")
        self._restarts += 1
        index = process.name.partition(".")[0]
        self._lives[index] = self._lives.get(index, 0) + 1
        name = f"{index}.{self._lives[index]}"
        self._on_event("actor_restarted", {"actor": name, "restarts": self._restarts})
        await self._start(self._plan.actor(self.address, name))

    async def _farewell(self) -> None:
        """The learner is done: the others were told by the hub, and leave."""
        if self._exits:
            await asyncio.wait(self._exits, timeout=LEAVE_TIMEOUT_S)

    def _failure(self, process: RoleProcess, code: int, addition: str = "") -> RunError:
        if code == USER_ERROR:
            return RunError(f"{process.name} refused to run:\n{log_tail(process.log, lines=5)}", USER_ERROR)
        fallen = [f"{other.name} {describe_exit(task.result())}" for task, other in self._exits.items() if task.done()]
        also = f" (then {', '.join(fallen)})" if fallen else ""
        return RunError(_with_log(f"{process.name} {describe_exit(code)}{addition}{also}", process.log))


def _rank(name: str) -> int:
    """Of several exits seen at once, the cause comes before its consequences."""
    return {"hub": 0, "learner": 1}.get(name, 2)


def _with_log(text: str, log: Path) -> str:
    tail = log_tail(log)
    return f"{text}; last lines of {log}:\n" + "\n".join(f"  | {line}" for line in tail.splitlines() or ["(empty)"])
