"""``slime-async top``: the table, and a real hub asked for it."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from slime_async.cli.main import main
from slime_async.cli.top import Target, watch
from slime_async.cli.top_view import Overview, table
from slime_async.config import HubConfig
from slime_async.protocol import PeerStatus, RunStatus
from tests.hub.players import make_config, run, stage

ACTOR = PeerStatus(
    "actor",
    "actor-3",
    0.2,
    {
        "host": "node-7",
        "release": "0.1.0",
        "weight_version": 17,
        "actor_tokens_per_s": 1234.0,
        "running_requests": 12,
        "warnings": 2,
        "last_warning": "episode of task 7 failed",
        "last_warning_s": 4.0,
    },
)
LEARNER = PeerStatus("learner", "learner-1", 0.1, {"phase": "rl", "step": 18, "steps": 200, "reward_mean": 0.5})


def shown(status: RunStatus) -> str:
    overview = Overview(2)
    overview.update(status, 0.0)
    console = Console(file=io.StringIO(), width=160)
    console.print(table(overview))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_the_table_shows_roles_rates_queue_and_last_errors() -> None:
    text = shown(RunStatus("demo-1", {"queued": 96, "published_version": 17}, (ACTOR, LEARNER), {"host": "head"}))
    for wanted in ("demo-1", "step 18/200", "96 queued", "node-7", "1,234 tok/s", "0.1.0", "head"):
        assert wanted in text
    assert "4 s ago  actor-3: episode of task 7 failed" in text


def test_a_hub_that_has_just_begun_can_be_shown() -> None:
    assert "waiting for the learner to connect; 0 actors connected" in shown(RunStatus("demo-1", {}, ()))


def test_a_real_hub_is_asked_over_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    async def play() -> None:
        async with stage(make_config()) as hub:
            await hub.actor("a-1")
            await asyncio.wait_for(watch(Target(hub.hub.address, HubConfig()), once=True), 30)

    run(play())
    assert "a-1" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["nowhere", "tcp://127.0.0.1:9"])
def test_what_cannot_be_asked_is_told_in_a_line(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", target, "--once"]) == 2
    assert target in capsys.readouterr().err
