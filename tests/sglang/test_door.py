"""Requests enter a server in bunches, and nobody waits for longer than they have to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slime_async import bunches
from slime_async.actors.engine import EngineError, PauseMode
from slime_async.actors.sglang.client import running_at_most
from slime_async.actors.sglang.door import Door
from slime_async.bunches import Bunches
from tests.sglang.scripted_server import ask, event, run, serving, settled
from tests.sglang.test_client_and_engine import hang

NEVER_S = 3600.0
FIRST = -1
"""Has been inside and left: nobody waits before it is known how long requests take"""


class Visitors:
    """Requests that stay until they are told to leave."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.inside: list[int] = []
        self._leave: dict[int, asyncio.Event] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def come(self, *numbers: int, again: bool = False) -> None:
        for number in numbers:
            self._leave[number] = asyncio.Event()
            self._tasks[number] = asyncio.create_task(self._visit(number, again))
            await settled()

    async def _visit(self, number: int, again: bool) -> None:
        async with self.door.passed(str(number), again=again):
            self.inside.append(number)
            await self._leave[number].wait()
        self.inside.remove(number)

    async def leave(self, *numbers: int) -> None:
        for number in numbers:
            self._leave[number].set()
            await settled()

    async def give_up(self, number: int) -> None:
        self._tasks[number].cancel()
        with suppress(asyncio.CancelledError):
            await self._tasks[number]
        if number in self.inside:
            self.inside.remove(number)


def visiting(fraction: float, wait_s: float, test: Callable[[Visitors], Awaitable[None]]) -> None:
    async def begin() -> None:
        visitors = Visitors(Door(fraction, wait_s))
        await visitors.come(FIRST)
        await visitors.leave(FIRST)
        await test(visitors)

    run(begin())


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests here last for microseconds: what they wait is the limit, not a multiple of that."""
    monkeypatch.setattr(bunches, "PATIENCE", 1e12)


def test_without_a_fraction_and_with_few_inside_nobody_waits() -> None:
    async def test(visitors: Visitors) -> None:
        await visitors.come(*range(8))
        assert visitors.inside == list(range(8))

    visiting(0.0, NEVER_S, test)
    visiting(1 / 4, NEVER_S, test)


def test_with_many_inside_a_fraction_of_them_enters_together() -> None:
    async def test(visitors: Visitors) -> None:
        await visitors.come(*range(8), 8)
        assert 8 not in visitors.inside
        await visitors.come(9)
        assert sorted(visitors.inside) == list(range(10))

    visiting(1 / 4, NEVER_S, test)


def test_those_who_leave_make_the_bunch_smaller() -> None:
    async def test(visitors: Visitors) -> None:
        await visitors.come(*range(8), 8)
        await visitors.leave(0)
        assert visitors.inside == [1, 2, 3, 4, 5, 6, 7, 8]

    visiting(1 / 4, NEVER_S, test)


def test_nobody_waits_for_longer_than_the_limit() -> None:
    async def test(visitors: Visitors) -> None:
        await visitors.come(*range(8), 8)
        while 8 not in visitors.inside:
            await asyncio.sleep(0.01)
        await visitors.come(9)  # the limit begins anew with the next who waits
        assert 9 not in visitors.inside
        while 9 not in visitors.inside:
            await asyncio.sleep(0.01)

    visiting(1 / 4, 0.2, test)


def test_who_gives_up_is_not_counted_outside_nor_inside() -> None:
    async def test(visitors: Visitors) -> None:
        await visitors.come(*range(8), 8)
        await visitors.give_up(8)
        await visitors.come(9)
        assert 9 not in visitors.inside
        await visitors.give_up(0)
        assert 9 in visitors.inside

    visiting(1 / 4, NEVER_S, test)


def test_who_is_given_up_in_the_moment_of_entering_leaves_again() -> None:
    async def test(visitors: Visitors) -> None:
        await visitors.come(0, 1, 2, 3, 4)
        visitors.door.excuse_all()
        await visitors.give_up(4)
        await visitors.come(5)
        assert 5 not in visitors.inside  # four are inside
        await visitors.come(6)
        assert sorted(visitors.inside) == [0, 1, 2, 3, 5, 6]

    visiting(1 / 2, NEVER_S, test)


def test_no_more_enter_than_the_server_decodes_at_once() -> None:
    async def test(visitors: Visitors) -> None:
        visitors.door.capacity = 4
        await visitors.come(*range(9))
        assert visitors.inside == [0, 1, 2, 3]
        await visitors.leave(1)
        assert visitors.inside == [0, 2, 3, 4]

    visiting(0.0, NEVER_S, test)


def test_places_of_a_full_server_are_taken_in_bunches() -> None:
    async def test(visitors: Visitors) -> None:
        visitors.door.capacity = 12
        await visitors.come(*range(12))
        await visitors.come(*range(12, 16))
        await visitors.leave(0)
        assert 12 not in visitors.inside  # a quarter of eleven is two
        await visitors.leave(1)
        assert sorted(visitors.inside) == list(range(2, 14))

    visiting(1 / 4, NEVER_S, test)


def test_a_full_server_is_waited_for_without_limit_but_a_free_place_is_not() -> None:
    async def test(visitors: Visitors) -> None:
        visitors.door.capacity = 8
        await visitors.come(*range(9))
        await asyncio.sleep(0.3)
        assert 8 not in visitors.inside
        await visitors.leave(0)
        while 8 not in visitors.inside:
            await asyncio.sleep(0.01)

    visiting(1 / 2, 0.1, test)


def test_while_the_door_is_shut_nobody_enters_and_who_was_cut_short_goes_first() -> None:
    async def test(visitors: Visitors) -> None:
        visitors.door.capacity = 2
        await visitors.come(0, 1, 2, 3)
        visitors.door.shut()
        await visitors.leave(0, 1)
        await visitors.come(4, 5, again=True)
        assert visitors.inside == []
        visitors.door.open()
        await settled()
        assert sorted(visitors.inside) == [4, 5]

    visiting(0.0, NEVER_S, test)


def test_who_has_waited_long_enough_at_a_shut_door_enters_once_it_is_open() -> None:
    async def test(visitors: Visitors) -> None:
        await visitors.come(*range(8), 8)
        visitors.door.shut()
        await asyncio.sleep(0.2)
        assert 8 not in visitors.inside
        visitors.door.open()
        while 8 not in visitors.inside:
            await asyncio.sleep(0.01)

    visiting(1 / 4, 0.1, test)


def test_one_who_asks_nothing_of_the_server_is_let_through_alone() -> None:
    async def test(visitors: Visitors) -> None:
        visitors.door.capacity = 2
        await visitors.come(0, 1, 2, 3)
        visitors.door.excuse("3")
        visitors.door.excuse("nobody")
        await settled()
        assert visitors.inside == [0, 1, 3]
        await visitors.leave(3)
        assert visitors.inside == [0, 1]
        await visitors.leave(0)
        assert visitors.inside == [1, 2]

    visiting(0.0, NEVER_S, test)


@pytest.mark.parametrize(
    ("info", "at_once"),
    [
        ({}, float("inf")),
        ({"internal_states": [{"effective_max_running_requests_per_dp": 48}]}, 48),
        ({"internal_states": [{"effective_max_running_requests_per_dp": 48}] * 2}, 96),
        ({"internal_states": [{"memory_usage": {}}]}, float("inf")),
    ],
)
def test_a_server_tells_how_many_requests_it_decodes_at_once(info: dict[str, Any], at_once: float) -> None:
    assert running_at_most(info) == at_once


def test_an_engine_keeps_the_servers_own_queue_empty(checkpoint: Path) -> None:
    limit = {"internal_states": [{"effective_max_running_requests_per_dp": 3}]}

    async def test() -> None:
        async with serving(checkpoint, arguments=limit) as (server, engine):
            server.answers["/generate"] = hang
            asked = [asyncio.create_task(engine.generate(replace(ask(), request_id=f"{i:04}"))) for i in range(5)]
            while len(server.asked()) < 3:
                await asyncio.sleep(0.01)
            await engine.abort("0003")
            assert (await asked[3]).finish_reason == "abort"
            status = await engine.status()
            assert (status.running_requests, status.waiting_requests) == (0, 4)  # nothing was sampled yet
            asked[0].cancel()
            while len(server.asked()) < 4:
                await asyncio.sleep(0.01)
            await engine.close()
            for task in asked[1:3] + asked[4:]:
                with pytest.raises(EngineError, match="was closed"):
                    await task

    run(test())


def test_an_answer_that_an_update_cut_short_goes_on_before_others_begin(checkpoint: Path) -> None:
    limit = {"internal_states": [{"effective_max_running_requests_per_dp": 1}]}

    async def test() -> None:
        async with serving(checkpoint, arguments=limit) as (server, engine):
            server.answer_once_cut()
            server.events = [event([7], 1, "abort")]
            first = asyncio.create_task(engine.generate(ask()))
            other = asyncio.create_task(engine.generate(replace(ask(), request_id="other")))
            while "/generate" not in server.paths():
                await asyncio.sleep(0.01)
            await engine.pause(PauseMode.ABORT)
            assert (await first).finish_reason == "abort"
            del server.answers["/generate"]
            server.events = [event([7], 1, "stop")]
            resumed = replace(ask(), request_id="resumed", resumed_tokens=1)
            again = asyncio.create_task(engine.generate(resumed))
            await settled()
            await engine.resume()
            await asyncio.gather(again, other)
            assert server.asked() == ["0123", "resumed", "other"]

    run(test())


def test_before_any_request_has_ended_nobody_waits() -> None:
    async def test() -> None:
        visitors = Visitors(Door(1 / 4, NEVER_S))
        await visitors.come(*range(20))
        assert visitors.inside == list(range(20))

    run(test())


def test_nobody_waits_for_longer_than_a_bunch_should_take_to_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bunches, "PATIENCE", 2.0)
    rule = Bunches(1 / 16, 1.0)
    assert rule.patience_s == 0
    rule.ended(4.0)
    assert rule.patience_s == pytest.approx(2 * 4.0 / 16)
    rule.ended(4.0 + 32)
    assert rule.patience_s == pytest.approx(2 * 5.0 / 16)
    rule.ended(3600.0)
    assert rule.patience_s == 1.0


def test_an_engine_ends_requests_that_wait_at_its_door(checkpoint: Path) -> None:
    async def test() -> None:
        async with serving(checkpoint, prefill_fraction=0.5, prefill_wait_s=NEVER_S) as (server, engine):
            server.events = [event([7], 1, "stop")]
            await engine.generate(ask())
            server.answers["/generate"] = hang
            asked = [asyncio.create_task(engine.generate(replace(ask(), request_id=f"{i:04}"))) for i in range(5)]
            while len(server.asked()) < 1 + 4:
                await asyncio.sleep(0.01)
            assert not any(task.done() for task in asked)
            await engine.abort("0004")
            assert (await asked.pop()).finish_reason == "abort"
            asked.append(asyncio.create_task(engine.generate(replace(ask(), request_id="0005"))))
            await settled()
            await engine.close()
            for task in asked:
                with pytest.raises(EngineError, match="was closed"):
                    await task
            assert len(server.asked()) == 1 + 4

    run(test())
