"""The SGLang servers of a benchmark: started once, one per place for an engine, and used by every mode in turn.

All of them see all devices, each computes on its own: so weights can go to any of them out of the memory of any device.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from slime_async.actors.engine import EngineError
from slime_async.actors.engines import server_arguments
from slime_async.actors.sglang.arguments import check_arguments
from slime_async.actors.sglang.client import SGLangClient
from slime_async.actors.sglang.server import LaunchSpec, ServerProcess
from slime_async.actors.sglang.versions import READY_PATHS_OWN
from slime_async.bench.modes import Mode
from slime_async.config import Config
from slime_async.trajectory import WeightId

CONTROL_TIMEOUT_S = 10.0
QUIET_TIMEOUT_S = 30.0
"""For the requests of an ended mode to leave the server"""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Servers:
    """Running servers by the first device of each."""

    processes: dict[int, ServerProcess]
    began: str

    @property
    def urls(self) -> dict[int, str]:
        return {device: process.url for device, process in self.processes.items()}

    @property
    def identity(self) -> str:
        """What tells these servers from any others."""
        pids = ", ".join(str(process.pid) for process in self.processes.values())
        return f"{len(self.processes)} SGLang servers that began at {self.began} (pids {pids})"

    async def quieten(self) -> None:
        """End what a mode left behind, and forget every cached prefix: no mode profits from the one before.

        Raises ``EngineError`` for a server that does not become quiet.
        """
        await asyncio.gather(*(_quieten(url) for url in self.urls.values()))

    async def close(self) -> None:
        await asyncio.gather(*(process.kill() for process in self.processes.values()))


async def start_servers(config: Config, modes: Sequence[Mode], logs: Path) -> Servers:
    """One server on every device on which any mode has an engine. Raises ``EngineError`` when one does not come up."""
    check_arguments(config.sglang)
    devices = sorted({device for mode in modes for device in mode.actor_devices})
    checkpoint, context = Path(config.model.path), config.sampling.max_context_tokens
    arguments = server_arguments(
        checkpoint, context, config.sglang, WeightId(0, 0), record_routing=config.actor.record_routing
    )
    servers = Servers({}, f"{datetime.now(UTC):%H:%M:%S} UTC")
    try:
        for device in devices:
            own = arguments if config.sglang.get("device") == "cpu" else (*arguments, "--base-gpu-id", str(device))
            servers.processes[device] = await ServerProcess.launch(LaunchSpec(own, logs / f"sglang-{device}.log"))
        limit_s = config.actor.startup_timeout_s
        await asyncio.gather(*(_wait_ready(process, limit_s) for process in servers.processes.values()))
    except BaseException:
        await servers.close()
        raise
    return servers


async def _wait_ready(process: ServerProcess, limit_s: float) -> None:
    client = SGLangClient(process.url, process.url, ready_paths=READY_PATHS_OWN)
    try:
        await process.wait_ready(lambda: client.ready(CONTROL_TIMEOUT_S), limit_s)
    finally:
        await client.close()


async def _quieten(url: str) -> None:
    client = SGLangClient(url, url, ready_paths=READY_PATHS_OWN)
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    try:
        while True:
            try:
                await client.post("/abort_request", {"rid": "", "abort_all": True}, CONTROL_TIMEOUT_S)
                await client.post("/flush_cache", {}, CONTROL_TIMEOUT_S)
            except EngineError:  # requests are still on their way out
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(POLL_S)
            else:
                return
    finally:
        await client.close()
