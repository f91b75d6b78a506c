"""``slime-async top``: a running job's roles, rates, staleness, queue and last errors, from wherever its hub is.

The table is redrawn every second in a terminal; elsewhere, or with ``--once``, it is printed once. It connects as an
observer: it takes no part, and any number of them may look.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slime_async.cli.common import HUB_ADDRESS
from slime_async.config import ConfigError, load_config
from slime_async.config.schema import HubConfig
from slime_async.protocol import GetStatus, Hello, Message, RunStatus, Shutdown

CALL_TIMEOUT_S = 10.0
REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask."""

    address: str
    hub: HubConfig
    max_staleness: int | None = None
    """Where the run's configuration is at hand"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="RUN|ADDRESS", help="a run's directory, or its hub's address, tcp://HOST:PORT"
    )
    parser.add_argument("--keys", metavar="DIR", type=Path, help="with ADDRESS: directory of CURVE keys")
    parser.add_argument("--key", default="client", help="with ADDRESS: which pair in DIR [client]")
    parser.add_argument("--once", action="store_true", help="print the table once")


def run(parsed: argparse.Namespace) -> int:
    from slime_async.cli.live import has_terminal
    from slime_async.transport.errors import ConnectionLost, DeadlineExceeded, RemoteError

    target = target_of(parsed)
    once = parsed.once or not has_terminal()
    try:
        asyncio.run(watch(target, once))
    except (ConnectionLost, DeadlineExceeded, RemoteError) as error:
        raise ConfigError(f"{parsed.target}: {error}") from error
    return 0


def target_of(parsed: argparse.Namespace) -> Target:
    """Raises ``ConfigError`` for what is neither a run nor an address."""
    if "://" in parsed.target:
        return Target(parsed.target, HubConfig(keys=parsed.keys, key=parsed.key))
    directory = Path(parsed.target)
    try:
        address = (directory / HUB_ADDRESS).read_text().strip()
    except OSError:
        raise ConfigError(
            f"{directory} has no {HUB_ADDRESS}: give the directory of a run that goes on, or tcp://HOST:PORT"
        ) from None
    config = load_config(directory / "config.toml")
    return Target(address, config.hub, config.staleness.max_staleness)


async def watch(target: Target, once: bool) -> None:
    """Ask and show; ends with the run, or when the hub cannot be reached."""
    from slime_async.transport.client import HubClient
    from slime_async.transport.security import client_security

    over = asyncio.Event()

    async def take(message: Message) -> None:
        if isinstance(message, Shutdown):
            over.set()

    name = f"top-{socket.gethostname()}-{os.getpid()}"
    client = await HubClient.connect(
        target.address, Hello("observer", name), handler=take, security=client_security(target.hub), timeout_s=5.0
    )

    async def status() -> RunStatus:
        reply = await client.call(GetStatus(), CALL_TIMEOUT_S)
        assert isinstance(reply, RunStatus), reply
        return reply

    try:
        await (show_once(target, status) if once else show(target, status, over))
    finally:
        await client.close()


async def show_once(target: Target, status: Callable[[], Awaitable[RunStatus]]) -> None:
    """Rates need two looks."""
    from rich.console import Console

    from slime_async.cli.top_view import Overview, table

    overview = Overview(target.max_staleness)
    overview.update(await status(), time.monotonic())
    await asyncio.sleep(REFRESH_S)
    overview.update(await status(), time.monotonic())
    Console(highlight=False).print(table(overview))


async def show(target: Target, status: Callable[[], Awaitable[RunStatus]], over: asyncio.Event) -> None:
    """Until the run is over."""
    from rich.live import Live

    from slime_async.cli.top_view import Overview, table

    overview = Overview(target.max_staleness)
    with Live(auto_refresh=False, screen=True) as live:
        while not over.is_set():
            overview.update(await status(), time.monotonic())
            live.update(table(overview), refresh=True)
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), REFRESH_S)
