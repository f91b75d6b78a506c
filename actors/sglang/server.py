"""One SGLang server as a child of this process: a command, an environment, a log, a deadline, an end.

The server leads a process group of its own, which is killed as a whole: its schedulers may be stuck in a collective
and take no other word. When this process dies, however it dies, the kernel kills the server, and the server's own
children follow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slime_async.actors.engine import EngineError
from slime_async.actors.sglang.versions import OWN_ENVIRONMENT
from slime_async.guard import guarded
from slime_async.logs import log_tail

POLL_S = 0.25
"""Between two questions whether a starting server is ready"""
KILL_TIMEOUT_S = 10.0
"""How long the kernel may take to bury a killed server: its driver frees the devices first"""


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """How to start one server."""

    arguments: tuple[str, ...]
    """Its command line, without host and port"""
    log: Path
    """Where its stdout and stderr go; appended to"""
    devices: tuple[int, ...] = ()
    """The GPUs it may see; empty leaves that to the environment"""
    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable, "-m", "sglang.launch_server")


class ServerProcess:
    """A started server; make it with ``launch``."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path) -> None:
        self.url = url
        self._process = process
        self._log = log

    @classmethod
    async def launch(cls, spec: LaunchSpec) -> ServerProcess:
        """Start it. Call this from a thread that lives as long as the server shall."""
        port = free_port()
        command = [*spec.command, *spec.arguments, "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, **OWN_ENVIRONMENT, **spec.environment}
        if spec.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.devices))
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with spec.log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *guarded(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return cls(process, f"http://127.0.0.1:{port}", spec.log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises ``EngineError`` with the log's last lines when the server has ended."""
        if self._process.returncode is not None:
            raise EngineError(f"its server ended ({_exit(self._process.returncode)}); {self.last_words()}")

    def last_words(self) -> str:
        return f"last lines of {self._log}:\n{log_tail(self._log)}"

    async def wait_ready(self, ready: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Until ``ready`` says so. Raises ``EngineError`` when the server ends before that, or the deadline comes."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.check()
            with contextlib.suppress(EngineError):  # nobody listens yet
                if await ready():
                    return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"its server is not ready after actor.startup_timeout_s = {timeout_s:g} s; {self.last_words()}"
                )
            await asyncio.sleep(POLL_S)

    async def kill(self) -> None:
        """End the whole group at once; returns when the server is gone. Idempotent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError as error:
            raise EngineError(f"its server (pid {self.pid}) did not end on SIGKILL: stuck in a driver?") from error
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that were being born


def free_port() -> int:
    """A TCP port that was free a moment ago. A server that finds it taken ends, and is started again with another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def share_devices(devices: Sequence[int], engines: int, per_engine: int) -> list[tuple[int, ...]]:
    """Each engine's devices, in order. Raises ``ValueError`` when they are too few; none at all is for CPUs."""
    if not devices:
        return [()] * engines
    if len(devices) < engines * per_engine:
        raise ValueError(
            f"actor.devices = {list(devices)} are too few for actor.engines = {engines} engines of {per_engine} "
            f"devices each ([sglang] tp_size × pp_size): {engines * per_engine} are needed"
        )
    return [tuple(devices[i * per_engine : (i + 1) * per_engine]) for i in range(engines)]


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"
