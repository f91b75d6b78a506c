"""The launcher's own connection to the hub: asks for the run's status, shows it, and takes no part."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from slime_async.cli.progress import watch
from slime_async.config import Config
from slime_async.protocol import GetStatus, Hello, Message, RunStatus, Shutdown

CALL_TIMEOUT_S = 10.0


async def observe(config: Config, directory: Path, address: str) -> None:
    """Show progress until the hub tells that the run is over. A lost hub ends the view with a line, not the run: the
    supervisor judges."""
    from slime_async.cli.live import has_terminal, watch_live
    from slime_async.transport.client import HubClient
    from slime_async.transport.errors import ConnectionLost, DeadlineExceeded, RemoteError
    from slime_async.transport.security import client_security

    told, over = False, asyncio.Event()

    async def take(message: Message) -> None:
        """Why the run ends, the processes' exits tell; here it makes the hub's going expected. One that failed may come
        back."""
        nonlocal told
        if isinstance(message, Shutdown):
            told = True
            if not message.failed:
                over.set()

    try:
        client = await HubClient.connect(
            address,
            Hello("observer", f"launcher-{os.getpid()}"),
            handler=take,
            security=client_security(config.hub),
            reconnect_s=config.hub.reconnect_s,
        )
    except ConnectionLost as error:
        print(f"no progress view: {error}", flush=True)
        return

    async def status() -> RunStatus:
        reply = await client.call(GetStatus(), CALL_TIMEOUT_S + config.hub.reconnect_s, retry=True)
        assert isinstance(reply, RunStatus), reply
        return reply

    async def view() -> None:
        if config.run.view == "auto" and has_terminal():
            await watch_live(status, config, directory)
        else:
            await watch(status, _show, config.staleness.max_staleness, config.run.log_interval_s)

    tasks = viewing, _ = asyncio.create_task(view()), asyncio.create_task(over.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if viewing.done():
            await viewing
    except (ConnectionLost, DeadlineExceeded, RemoteError) as error:
        if not told:
            print(f"no progress view any more: {error}", flush=True)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()


def _show(line: str) -> None:
    print(line, flush=True)
