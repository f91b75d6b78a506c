"""Actor and learner behind a bad network: everything arrives, and counts once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from slime_async.protocol import Granted
from slime_async.trajectory import TrajectoryKey
from tests.hub import players
from tests.hub.players import Actor, Learner, make_config, run, stage
from tests.transport.proxy import Proxy, a_proxy

BATCHES = 6
PER_BATCH = 4
PAYLOAD_BYTES = 1 << 20
Fault = Callable[[Proxy], Awaitable[None]]


async def train(learner: Learner, batches: int) -> list[TrajectoryKey]:
    """The keys of everything trained, in order."""
    trained: list[TrajectoryKey] = []
    await learner.publish(0)
    for version in range(batches):
        batch = await learner.leased(version)
        for trajectory in batch.trajectories:
            assert np.array_equal(trajectory.extras["payload"], payload_of(trajectory.key))
            trained.append(trajectory.key)
        await learner.commit(version)
        await learner.publish(version + 1)
    return trained


def payload_of(key: TrajectoryKey) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.full(PAYLOAD_BYTES, (key.task * 16 + key.sample) % 251, np.uint8)


async def act(actor: Actor) -> None:
    """Deliver whatever is granted, several at a time, for ever."""
    async with asyncio.TaskGroup() as deliveries:
        deliveries.create_task(actor.client.wait_closed())
        while True:
            granted = await actor.hears(Granted)
            assert isinstance(granted, Granted)
            for reservation in granted.reservations:
                if reservation not in actor.held:
                    actor.held.append(reservation)
                    deliveries.create_task(deliver(actor, reservation))


async def deliver(actor: Actor, reservation: players.Reservation) -> None:
    outcome = await actor.deliver(reservation, extras={"payload": payload_of(reservation.key)})
    assert outcome in ("accepted", "duplicate")
    actor.held.remove(reservation)


def trains_exactly_once(fault: Fault, heartbeat_timeout_s: float = 5.0, limit_s: float = 60.0) -> None:
    async def scenario() -> None:
        config = make_config(eta=BATCHES, heartbeat_timeout_s=heartbeat_timeout_s, learner={"max_restarts": 9})
        async with stage(config) as hub, a_proxy(hub.hub.address) as proxy:
            actor = await Actor("a").join(proxy.address, slots=8)
            learner = await Learner("learner").join(proxy.address)
            acting = asyncio.create_task(act(actor))
            training = asyncio.create_task(train(learner, BATCHES))
            await fault(proxy)
            await asyncio.wait({acting, training}, return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                await acting
            trained = await training
            assert len(trained) == len(set(trained)) == BATCHES * PER_BATCH
            assert {key.task for key in trained} == set(range(len(trained) // 2))
            acting.cancel()
            await actor.client.close()
            await learner.client.close()

    run(scenario(), limit_s)


async def forwarded(proxy: Proxy, size_bytes: int) -> None:
    while proxy.forwarded_bytes < size_bytes:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("where_bytes", [100_000, 2_500_000, 9_000_000])
def test_a_connection_cut_in_the_middle_of_a_message_loses_and_doubles_nothing(where_bytes: int) -> None:
    async def cut(proxy: Proxy) -> None:
        proxy.cut_after(where_bytes)
        await forwarded(proxy, where_bytes + PAYLOAD_BYTES)
        assert proxy.cuts == 1
        proxy.cut_after(PAYLOAD_BYTES + 77)

    trains_exactly_once(cut)


def test_a_network_that_swallows_everything_for_longer_than_patience_loses_and_doubles_nothing() -> None:
    async def blackhole(proxy: Proxy) -> None:
        await forwarded(proxy, 5_000_000)
        proxy.swallow()
        await asyncio.sleep(2.5)
        proxy.heal()

    trains_exactly_once(blackhole, heartbeat_timeout_s=1.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("heartbeat_timeout_s", [5.0, 60.0])  # both sides give up, or neither does
def test_30_seconds_of_blackhole_lose_and_double_nothing(
    heartbeat_timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(players, "WAIT_S", 100.0)

    async def blackhole(proxy: Proxy) -> None:
        await forwarded(proxy, 5_000_000)
        proxy.swallow()
        await asyncio.sleep(30)
        proxy.heal()

    trains_exactly_once(blackhole, heartbeat_timeout_s, limit_s=240)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_200_ms_of_delay_and_one_percent_loss_lose_and_double_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "WAIT_S", 100.0)

    async def bad(proxy: Proxy) -> None:
        proxy.delay_s, proxy.loss = 0.2, 0.01

    trains_exactly_once(bad, limit_s=240)
