"""The launcher's view of a run: how it ends."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from slime_async.cli.observe import observe
from slime_async.protocol import Finish, Ok
from tests.hub.players import WAIT_S, Stage, make_config, run, stage


async def begin(hub: Stage, directory: Path) -> asyncio.Task[None]:
    """Somebody looks."""
    looking = asyncio.create_task(observe(make_config(), directory, hub.hub.address))
    async with asyncio.timeout(WAIT_S):
        while not any(peer.role == "observer" for peer in hub.hub._server.peers.values()):
            await asyncio.sleep(0.01)
    return looking


def test_the_view_of_a_run_that_is_over_ends_before_the_hub_and_misses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await hub.actor(), await hub.learner()
            looking = await begin(hub, tmp_path)
            assert await learner.call(Finish("all steps done")) == Ok()
            async with asyncio.timeout(WAIT_S):
                await looking
            await actor.client.close()
            await learner.client.close()
            await hub.running

    with caplog.at_level(logging.WARNING, logger="slime_async.transport.client"):
        run(test())
    assert "trying to reach it again" not in caplog.text
    assert "no progress view" not in capsys.readouterr().out


def test_a_view_that_is_not_wanted_any_more_ends(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            looking = await begin(hub, tmp_path)
            looking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looking

    run(test())
