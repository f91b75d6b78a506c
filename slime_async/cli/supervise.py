"""Keeps the processes of one run alive, or ends all of them: who may die, who is started again, and what is said.

===========  =========================  =======================================================================
who leaves   cleanly (code 0)           otherwise
===========  =========================  =======================================================================
learner      the run is finished        started again, from its last checkpoint
hub          the learner must follow    killed by a signal: started again at its address; else the run failed
actor        the learner must follow    started again
===========  =========================  =======================================================================

Each is started again under a new name, ``max_restarts`` times per role in all; then, or at once when it says that the
user must change something, the run failed. An actor that left because its scheduler told it to is replaced, and not
counted. How many actors there are may change while it runs: the newest are asked to leave, and are not missed; new ones
take the places that are free.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from slime_async.cli.launcher import (
    CONSEQUENCE,
    LEFT,
    USER_ERROR,
    Launcher,
    Role,
    RoleCommand,
    RoleProcess,
    describe_exit,
    place_of,
    role_of,
)
from slime_async.logs import log_tail
from slime_async.protocol import Scalar
from slime_async.telemetry.events import EventName

HUB_START_TIMEOUT_S = 60.0
"""Python and ZeroMQ come up in a second or two; more means a very slow disk"""
READY_POLL_S = 0.05
SCALE_POLL_S = 1.0
"""How soon another number of actors is noticed"""
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

    hub: Callable[[str, str], RoleCommand]
    """(address, name); the address is empty at first, which leaves it to the hub"""
    ready_file: Path
    """The hub writes its address here once it listens"""
    learner: Callable[[str, str], RoleCommand]
    """(the hub's address, name)"""
    actor: Callable[[str, str], RoleCommand]
    """(the hub's address, name)"""
    actors: int
    max_restarts: Mapping[Role, int]


class Supervisor:
    """Runs one plan to its end.

    *consumes* exits of processes; *produces* restarts, and the end of everything; *waits for* the learner.
    """

    def __init__(
        self,
        launcher: Launcher,
        plan: RunPlan,
        on_event: Callable[[EventName, Mapping[str, Scalar]], None],
        wanted_actors: Callable[[], int | None] = lambda: None,
    ) -> None:
        """``wanted_actors`` is asked again and again while the run goes on; None leaves them as they are."""
        self._launcher = launcher
        self._plan = plan
        self._on_event = on_event
        self._wanted_actors = wanted_actors
        self._actors: list[str] = []
        """Places of those that shall run, the oldest first"""
        self._all_started = False
        """Whether all of the plan has been started"""
        self._leaving: set[str] = set()
        self._exits: dict[asyncio.Task[int], RoleProcess] = {}
        self._lives: dict[str, int] = {}
        self._restarts: Counter[Role] = Counter()
        self.address = ""

    async def start(self) -> str:
        """Start everything; returns the hub's address. Raises ``RunError`` when the hub does not come up."""
        self._plan.ready_file.unlink(missing_ok=True)  # a run that is resumed has one of its last hub
        await self._start(self._plan.hub("", "hub"))
        self.address = await self._hub_address()
        for _ in range(self._plan.actors):
            await self._add_actor()
        await self._start(self._plan.learner(self.address, "learner"))
        return self.address

    async def wait(self) -> None:
        """Until the learner is done and the others have left. Raises ``RunError``; call ``stop`` in any case."""
        deadline: float | None = None
        loop = asyncio.get_running_loop()
        self._all_started = True
        while True:
            if deadline is None:
                await self._scale()
            patience = SCALE_POLL_S if deadline is None else max(0.0, deadline - loop.time())
            done, _ = await asyncio.wait(self._exits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done and deadline is not None:
                raise RunError("the others left, but the learner is still there: stopping it")
            for task in sorted(done, key=lambda task: _rank(self._exits[task].name)):
                process, code = self._exits.pop(task), task.result()
                if (place := place_of(process.name)) in self._leaving:
                    self._leaving.remove(place)
                    self._on_event("role_left", {"role": "actor", "process": process.name, "exit_code": code})
                elif code == CONSEQUENCE:
                    deadline = deadline or loop.time() + CAUSE_TIMEOUT_S
                elif code:
                    await self._survive(process, code)
                elif role_of(process.name) == "learner":
                    await self._farewell()
                    return
                else:
                    deadline = deadline or loop.time() + FOLLOW_TIMEOUT_S

    async def stop(self) -> None:
        """End whatever still runs."""
        await self._launcher.stop()
        for task in self._exits:
            task.cancel()

    async def _scale(self) -> None:
        """Bring the number of actors to what is wanted; who leaves is not waited for."""
        wanted = self._wanted_actors()
        if wanted is None:
            return
        while len(self._actors) < wanted:
            await self._add_actor()
        while len(self._actors) > wanted:
            place = self._actors.pop()
            self._leaving.add(place)
            for process in self._exits.values():
                if place_of(process.name) == place:
                    self._on_event("role_leaving", {"role": "actor", "process": process.name})
                    await process.leave()

    async def _add_actor(self) -> None:
        place = next(p for p in map("actor-{}".format, count()) if p not in self._leaving and p not in self._actors)
        self._actors.append(place)
        name = place
        if place in self._lives:  # somebody had this place, and has left it
            self._lives[place] += 1
            name = f"{place}.{self._lives[place]}"
        self._lives.setdefault(place, 0)
        if self._all_started:
            self._on_event("role_added", {"role": "actor", "process": name})
        await self._start(self._plan.actor(self.address, name))

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
        """Start what died again, or raise ``RunError``."""
        role = role_of(process.name)
        restarts, allowed = self._restarts[role], self._plan.max_restarts[role]
        gives_up = role == "hub" and code > 0  # it has its reasons
        if code == USER_ERROR or gives_up or (role != "actor" and not allowed):
            if self._exits:
                await asyncio.wait(self._exits, timeout=AFTERMATH_S, return_when=asyncio.ALL_COMPLETED)
            raise self._failure(process, code)
        self._on_event("role_died", {"role": role, "process": process.name, "exit_code": code})
        preempted = role == "actor" and code in (LEFT, -signal.SIGTERM)
        if restarts == allowed and not preempted:
            raise self._failure(process, code, f", and all {restarts} of {role}.max_restarts are used up")
        self._restarts[role] += not preempted
        place = place_of(process.name)
        self._lives[place] = self._lives.get(place, 0) + 1
        name = f"{place}.{self._lives[place]}"
        self._on_event("role_restarted", {"role": role, "process": name, "restarts": self._restarts[role]})
        command = {"hub": self._plan.hub, "learner": self._plan.learner, "actor": self._plan.actor}[role]
        await self._start(command(self.address, name))

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
    return ("hub", "learner", "actor").index(role_of(name))


def _with_log(text: str, log: Path) -> str:
    tail = log_tail(log)
    return f"{text}; last lines of {log}:\n" + "\n".join(f"  | {line}" for line in tail.splitlines() or ["(empty)"])
