"""The launcher's own connection to the hub: asks for the run's status, shows it, and takes no part."""

from __future__ import annotations

import os
from pathlib import Path

from slime_async.cli.progress import watch
from slime_async.config import Config
from slime_async.protocol import GetStatus, Hello, Message, RunStatus, Shutdown

CALL_TIMEOUT_S = 10.0


async def observe(config: Config, directory: Path, address: str) -> None:
    """Show progress until cancelled. A lost hub ends the view with a line, not the run: the supervisor judges."""
    from slime_async.cli.live import has_terminal, watch_live
    from slime_async.transport.client import HubClient
    from slime_async.transport.errors import ConnectionLost, DeadlineExceeded, RemoteError
    from slime_async.transport.security import client_security

    over = False

    async def take(message: Message) -> None:
        """Why the run ends, the processes' exits tell; here it makes the hub's going expected."""
        nonlocal over
        over = over or isinstance(message, Shutdown)

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

    try:
        if config.run.view == "auto" and has_terminal():
            await watch_live(status, config, directory)
        else:
            await watch(status, _show, config.staleness.max_staleness, config.run.log_interval_s)
    except (ConnectionLost, DeadlineExceeded, RemoteError) as error:
        if not over:
            print(f"no progress view any more: {error}", flush=True)
    finally:
        await client.close()


def _show(line: str) -> None:
    print(line, flush=True)
