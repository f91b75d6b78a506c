"""An event loop that stands still is noticed from outside, and told with the place where it stands."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from slime_async.actors.loop_watch import LoopWatch

DEADLINE_S = 30.0


class Listener(logging.Handler):
    """Sets ``heard`` with the first warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard = threading.Event()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.heard.set()


@pytest.fixture
def listener() -> Listener:
    return Listener()


def a_verifier_that_takes_its_time(listener: Listener) -> None:
    assert listener.heard.wait(DEADLINE_S)


def test_what_keeps_the_loop_from_running_is_named_once(listener: Listener) -> None:
    async def main() -> None:
        async with LoopWatch(limit_s=0.05):
            a_verifier_that_takes_its_time(listener)

    log = logging.getLogger("slime_async.actors.loop_watch")
    log.addHandler(listener)
    try:
        asyncio.run(main())
    finally:
        log.removeHandler(listener)
    assert len(listener.texts) == 1
    assert "a_verifier_that_takes_its_time" in listener.texts[0]
    assert "task.isolate_reward" in listener.texts[0]
