"""Data-parallel ranks that fetch their own trajectories."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_async.learner.fetch import plan_shares
from slime_async.protocol import Fetch, FollowLease, Granted, Lease, NotReady, StoredTrajectory
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.errors import RemoteError
from tests.hub.players import Actor, make_config, run, stage

STEPS = 3
RANKS = 4
Line = tuple[str, list[list[int]], list[list[int]]]
"""Digest of the common columns, keys with the large column, all keys"""


async def deliver_for_ever(actor: Actor) -> None:
    while True:
        granted = await actor.hears(Granted)
        assert isinstance(granted, Granted)
        for reservation in granted.reservations:
            experts = np.full((5, 1000 * (1 + reservation.sample)), reservation.task.serial % 251, np.uint8)
            await actor.deliver(reservation, extras={"experts": experts})


async def train(address: str, store: Path) -> list[list[Line]]:
    """What each rank printed."""
    job = Path(__file__).parent / "fetch_job.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, str(job), str(rank), str(store), address),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]
    outputs = [(await process.communicate())[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS
    return [[json.loads(line) for line in output.splitlines()] for output in outputs]


def test_every_rank_has_what_training_needs_and_each_large_column_was_fetched_by_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stage(make_config(eta=STEPS, learner={"max_restarts": 1})) as hub:
            acting = asyncio.create_task(deliver_for_ever(await hub.actor(slots=8)))
            printed = await train(hub.hub.address, tmp_path / "store")
            acting.cancel()
        first, again = [lines[:STEPS] for lines in printed], [lines[STEPS:] for lines in printed]
        assert again == first  # the same batches, in the same order, after a restart without a checkpoint
        for steps in zip(*first, strict=True):
            digests, large, keys = zip(*steps, strict=True)
            assert len(set(digests)) == 1
            assert large[1] == large[3] == []
            assert sorted(large[0] + large[2]) == sorted(keys[0])
            assert len(large[0]) == len(large[2])
        assert len({line[0] for line in first[0]}) == STEPS

    run(scenario(), 110.0)


def test_nothing_is_fetched_but_what_is_leased() -> None:
    async def scenario() -> None:
        async with stage(make_config()) as hub:
            actor, learner, rank = await hub.actor(), await hub.learner(), await hub.observer()
            await learner.publish(0)
            await actor.deliver_all(await actor.granted(8))
            assert isinstance(await rank.call(FollowLease(1, 0, 0.01)), NotReady)
            with pytest.raises(RemoteError, match=r"batch 0 does not hold .*lease it"):
                await rank.call(Fetch(0, (TrajectoryKey(0, 0),)))
            following = asyncio.create_task(rank.call(FollowLease(1, 0, 8.0)))
            leased = await learner.call(Lease(1, 0, 8.0, payloads=False))
            assert leased.trajectories == ()  # type: ignore[attr-defined]
            assert (await following).stored == leased.stored  # type: ignore[attr-defined]
            keys = tuple(one.key for one in leased.stored)  # type: ignore[attr-defined]
            fetched = await rank.call(Fetch(0, keys[1:3]))
            assert tuple(t.key for t in fetched.trajectories) == keys[1:3]  # type: ignore[attr-defined]
            assert isinstance(await rank.call(FollowLease(2, 0, 0.01)), NotReady)  # of another learner

    run(scenario())


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 5))
@settings(max_examples=50)
def test_every_trajectory_is_in_one_share(tokens: list[int], ranks: int) -> None:
    stored = [StoredTrajectory(TrajectoryKey(i, 0), n, n, 0, 0, 1.0) for i, n in enumerate(tokens)]
    shares = plan_shares(stored, 64, ranks)
    assert len(shares) == ranks
    assert sorted(key for share in shares for key in share) == [one.key for one in stored]
