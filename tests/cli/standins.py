"""Stand-in roles: tiny real processes that the launcher tests start in place of hub, actors and learner.

Run as a script (``standins.py RUN_DIRECTORY LEARNER``) it is a whole launcher with such roles, to be interrupted.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from slime_async.cli.launcher import RoleCommand
from slime_async.cli.supervise import RunPlan
from slime_async.cli.train import train
from slime_async.config import Config

DEADLINE_S = 30.0

PRELUDE = """
import os, pathlib, signal, subprocess, sys
run, name = pathlib.Path(sys.argv[1]), sys.argv[2]

def record(suffix="", pid=None):
    path = run / "pids" / (name + suffix)
    path.with_suffix(path.suffix + ".tmp").write_text(str(pid or os.getpid()))
    path.with_suffix(path.suffix + ".tmp").rename(path)
"""
HUB = """
record()
(run / "address.tmp").write_text("tcp://127.0.0.1:7")
(run / "address.tmp").rename(run / "address")
"""
FOREVER = "record()\nsignal.pause()\n"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nrecord()\nwhile True: signal.pause()\n"
WITH_CHILD = """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
record(".child", child.pid)
record()
signal.pause()
"""
WITH_GUARDED_CHILD = WITH_CHILD.replace("Popen(", "Popen(guarded(").replace('pause()"]', 'pause()"])')
WITH_GUARDED_CHILD = "from slime_async.guard import guarded\n" + WITH_GUARDED_CHILD
"""As an actor starts an engine's server"""
TORCHRUN = """
rank = "import signal; from slime_async.guard import die_with_parent; die_with_parent(); print(1, flush=True); "
rank += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: signal.pause()"
child = subprocess.Popen([sys.executable, "-c", rank], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
record(".rank", child.pid)
record()
signal.pause()
"""
"""As torchrun does: its ranks are in sessions of their own, and these ranks ignore SIGTERM"""


def standin(run: Path, name: str, code: str) -> RoleCommand:
    return RoleCommand(name, ("-c", PRELUDE + code, str(run), name))


def make_plan(
    run: Path,
    hub: str = HUB + "signal.pause()",
    actor: str = FOREVER,
    learner: str = FOREVER,
    actors: int = 1,
    max_restarts: int = 2,
    hub_restarts: int = 0,
    learner_restarts: int = 0,
) -> RunPlan:
    (run / "pids").mkdir(parents=True)
    return RunPlan(
        hub=lambda _address, name: standin(run, name, hub),
        ready_file=run / "address",
        learner=lambda _address, name: standin(run, name, learner),
        actor=lambda _address, name: standin(run, name, actor),
        actors=actors,
        max_restarts={"hub": hub_restarts, "learner": learner_restarts, "actor": max_restarts},
    )


def recorded(run: Path, names: set[str]) -> list[int]:
    """The pids of all ``names``, once all of them run."""
    deadline = time.monotonic() + DEADLINE_S
    while not all((run / "pids" / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not all start: {os.listdir(run / 'pids')}"
        time.sleep(0.02)
    return [int((run / "pids" / name).read_text()) for name in names]


def is_running(pid: int) -> bool:
    """Whether a process exists that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pids: list[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.02)


async def watch_nothing(_config: Config, _directory: Path, _address: str) -> None:
    await asyncio.Event().wait()


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    plan = make_plan(
        directory, actor=WITH_GUARDED_CHILD, learner={"torchrun": TORCHRUN, "stubborn": STUBBORN}[sys.argv[2]]
    )
    sys.exit(train(Config(), directory, plan, watch_nothing))
