"""A hub's process is killed and another goes on in its place: what it promised holds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from slime_async.audit import audit
from slime_async.config import Config
from slime_async.config.dump import dump_toml
from slime_async.demo.tokenizer import make_tokenizer
from slime_async.protocol import Batch, Commit, Drain, Evaluate, EvaluationResult, Finish, NotReady, Ok
from slime_async.queue import TaskStream
from slime_async.transport.journal import read_trail
from tests.hub import judges
from tests.hub.players import SOURCES, WAIT_S, Actor, Learner, make_config, run

B = 4
"""Trajectories per batch of ``make_config()``"""
JUDGE_WAIT_S = 60.0
"""For a judge's process, which loads a tokenizer first"""


class Process:
    """The hub's process of one run directory, in one life after another."""

    def __init__(self, directory: Path, config: Config) -> None:
        self._directory = directory
        (directory / "config.toml").write_text(dump_toml(config))
        self.address = ""
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        ready = self._directory / "hub.address"
        ready.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "slime_async.cli.main", "hub", str(self._directory / "config.toml")]
        argv += ["--run-directory", str(self._directory)]
        argv += ["--hub.address", self.address] if self.address else []
        with (self._directory / "hub.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stderr=log)
        async with asyncio.timeout(WAIT_S):
            while not ready.exists():
                assert self._process.poll() is None, (self._directory / "hub.log").read_text()
                await asyncio.sleep(0.02)
        self.address = ready.read_text()

    def kill(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(WAIT_S)

    async def terminate(self) -> int:
        """SIGTERM, as schedulers send it; the exit code."""
        assert self._process is not None
        self._process.terminate()
        return await self.exit_code()

    async def restart(self) -> None:
        self.kill()
        await self.start()

    async def exit_code(self) -> int:
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, WAIT_S)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


@asynccontextmanager
async def stage(tmp_path: Path, config: Config | None = None) -> AsyncIterator[tuple[Process, Actor, Learner]]:
    """A hub, an actor with many slots, and the learner; version 0 is published."""
    hub, players = Process(tmp_path, config or make_config(heartbeat_timeout_s=1.0)), AsyncExitStack()
    try:
        await hub.start()
        actor, learner = Actor("a"), Learner("learner")
        await actor.join(hub.address, slots=100)
        await learner.join(hub.address)
        await learner.publish(0)
        players.push_async_callback(actor.client.close)
        players.push_async_callback(learner.client.close)
        async with players:
            yield hub, actor, learner
    finally:
        hub.close()


def test_a_restarted_hub_still_has_every_trajectory_that_it_accepted(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path) as (hub, actor, learner):
            granted = await actor.granted(2 * B)
            await actor.deliver_all(granted[: B + 1])
            actor.held = granted[B + 1 :]
            await hub.restart()
            batch = await learner.leased(0)
            assert [t.key for t in batch.trajectories] == [r.key for r in granted[:B]]
            assert await actor.deliver(granted[0]) == "duplicate"
            await learner.commit(0)
            await actor.deliver_all(granted[B + 1 :])
            assert [t.key for t in (await learner.leased(1)).trajectories] == [r.key for r in granted[B:]]

    run(test())


def test_a_hub_that_is_told_to_stop_writes_no_half_of_a_delivery(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, make_config(eta=4, heartbeat_timeout_s=1.0)) as (hub, actor, learner):
            granted = await actor.granted(5 * B)
            actor.held = granted
            delivering = [asyncio.create_task(actor.deliver(reservation)) for reservation in granted]
            await asyncio.wait(delivering, return_when=asyncio.FIRST_COMPLETED)
            assert await hub.terminate() == 143
            assert "Traceback" not in (tmp_path / "hub.log").read_text()
            await hub.start()
            assert set(await asyncio.gather(*delivering)) <= {"accepted", "duplicate"}
            assert len((await learner.leased(0)).trajectories) == B

    run(test())


def judged_config(directory: Path) -> Config:
    """Groups are judged once there is a file ``gate`` in ``directory``; tasks come in an order that looks random."""
    make_tokenizer().save_pretrained(directory / "model")
    source = {"factory": f"{judges.__name__}:source", "arguments": {"gate": str(directory / "gate")}}
    task = {"train": {"train": source}, "shuffle": True}
    functions = {"group_reward": f"{judges.__name__}:group_reward", "filter": f"{judges.__name__}:keep"}
    plain = make_config(heartbeat_timeout_s=1.0).model_dump()
    plain["task"] |= task | functions
    plain["model"] |= {"path": str(directory / "model")}
    return Config.model_validate(plain)


def test_a_hub_killed_between_delivery_and_judgement_loses_neither(tmp_path: Path) -> None:
    """Groups 0 to 3 are delivered, and the judge is on the first of them; it refuses 1. Another hub goes on, and dies
    when they are judged and one batch is trained. The order of tasks goes on, too."""
    config = judged_config(tmp_path)

    async def test() -> None:
        async with stage(tmp_path, config) as (hub, actor, learner):
            granted = await actor.granted(2 * B)
            for reservation in granted:
                kept = float(reservation.key.task != 1)
                assert await actor.deliver(reservation, reward=kept + 0.25 * reservation.sample) == "accepted"
            waiting = await learner.lease(0, 0.1)
            assert isinstance(waiting, NotReady)
            assert "4 groups wait for their judge" in waiting.reason
            await hub.restart()
            (tmp_path / "gate").touch()
            first = await learner.leased(0, JUDGE_WAIT_S)
            assert first.rewards == (11.0, 11.25, 11.0, 11.25)
            granted += await actor.granted(2)  # in the place of the group that was refused
            await learner.commit(0)
            actor.held = granted[-2:]
            await hub.restart()
            for reservation in granted[-2:]:
                assert await actor.deliver(reservation, reward=2.0) == "accepted"
            second = await learner.leased(1, JUDGE_WAIT_S)
            assert sorted(second.rewards) == [11.0, 11.25, 12.0, 12.0]
            # groups are judged side by side: any two of the first four that are kept may be the first to be ready
            trained = [t.task.serial for batch in (first, second) for t in batch.trajectories]
            assert trained[::2] == trained[1::2]
            assert sorted(trained) == [0, 0, 2, 2, 3, 3, 4, 4]
            assert 4 not in trained[:4]
            hub.kill()
        report = audit(read_trail(tmp_path / "journal"), (), finished=False)
        assert (report.violations, dict(report.dropped)) == ((), {"filtered": 2})
        stream = TaskStream.from_config(config)
        stream.declare_sources(SOURCES)
        for reservation in granted[::2]:
            assert stream.peek() == reservation.task
            stream.advance(reservation.task.source)

    run(test(), 4 * JUDGE_WAIT_S)


def test_what_an_actor_still_works_on_is_granted_to_nobody_else_after_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path) as (hub, actor, learner):
            actor.held = await actor.granted(2 * B)
            await hub.restart()
            queue = (await actor.status()).queue
            assert (queue["reserved"], queue["running"]) == (0, 2 * B)
            other = await Actor("other").join(hub.address, slots=1000)
            await actor.deliver_all(actor.held)
            await learner.leased(0)
            await learner.commit(0)
            await learner.publish(1)
            new = await other.granted(B)
            assert {r.key for r in new}.isdisjoint(r.key for r in actor.held)
            await other.client.close()

    run(test())


def test_calls_that_a_restart_interrupts_are_answered_by_the_next_hub(tmp_path: Path) -> None:
    """A lease, a commit and an evaluation wait while the hub dies; none of them is carried out twice."""

    async def test() -> None:
        async with stage(tmp_path) as (hub, actor, learner):
            granted = await actor.granted(2 * B)
            evaluating = asyncio.create_task(learner.call(Evaluate("before", "held-out", SOURCES["held-out"], WAIT_S)))
            evaluation = await actor.granted(SOURCES["held-out"])
            leasing = asyncio.create_task(learner.lease(0))
            await learner.status()
            actor.held = [*granted, *evaluation]
            hub.kill()
            delivering = [asyncio.create_task(actor.deliver(r)) for r in actor.held]
            await hub.start()
            assert await asyncio.gather(*delivering) == ["accepted"] * len(actor.held)
            assert isinstance(await leasing, Batch)
            result = await evaluating
            assert isinstance(result, EvaluationResult)
            assert (len(result.rewards), result.failed) == (SOURCES["held-out"], 0)
            hub.kill()
            committing = asyncio.create_task(learner.call(Commit(1, 0)))
            await hub.start()
            assert await committing == Ok()
            await learner.commit(0)
            assert (await learner.status()).queue["trained_version"] == 1

    run(test())


def test_batches_are_trained_again_from_the_journal_by_a_learner_that_restarts(tmp_path: Path) -> None:
    config = make_config(heartbeat_timeout_s=1.0, learner={"max_restarts": 1})

    async def test() -> None:
        async with stage(tmp_path, config) as (hub, actor, learner):
            await actor.deliver_all(await actor.granted(2 * B))
            first, second = await learner.leased(0), await learner.leased(1)
            await learner.commit(0)
            await learner.vanish()
            await hub.restart()
            again = await Learner("learner-2").join(hub.address, incarnation=2, version=0)
            again.incarnation = 2
            await actor.granted_nothing()
            await again.publish(0)
            assert [t.key for t in (await again.leased(0)).trajectories] == [t.key for t in first.trajectories]
            await again.commit(0)
            assert [t.key for t in (await again.leased(1)).trajectories] == [t.key for t in second.trajectories]
            await again.client.close()

    run(test())


def test_nothing_is_granted_after_a_restart_before_weights_that_a_drain_was_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, make_config(eta=0, heartbeat_timeout_s=1.0)) as (hub, actor, learner):
            await actor.deliver_all(await actor.granted(B))
            await learner.leased(0)
            await learner.commit(0)
            assert await learner.call(Drain(WAIT_S)) == Ok()
            await hub.restart()
            assert isinstance(await learner.lease(1, 0.1), NotReady)
            await actor.granted_nothing()
            await learner.publish(1)
            await actor.granted(B)

    run(test())


def test_a_hub_that_finished_well_leaves_with_code_0(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path) as (hub, actor, learner):
            await hub.restart()
            assert await learner.call(Finish("all steps done")) == Ok()
            await actor.client.close()
            await learner.client.close()
            assert await hub.exit_code() == 0

    run(test())


def test_a_journal_of_another_batch_shape_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path) as (hub, _, _):
            hub.kill()
            (tmp_path / "config.toml").write_text(dump_toml(make_config(group_size=3)))
            with pytest.raises(AssertionError, match="2 groups of 2 per batch, the configuration 2 of 3"):
                await hub.start()

    run(test())


def test_a_second_hub_on_the_same_journal_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path) as (_, _, learner):
            second = Process(tmp_path, make_config())
            with pytest.raises(AssertionError, match="has this journal open"):
                await second.start()
            await learner.status()

    run(test())


def test_leases_go_on_where_they_were(tmp_path: Path) -> None:
    """Many restarts: every batch once, none missing, in order."""

    async def test() -> None:
        async with stage(tmp_path) as (hub, actor, learner):
            trained = []
            for version in range(3):
                actor.held = await actor.granted(B if version else 2 * B)
                await actor.deliver_all(actor.held, version)
                actor.held = []
                await hub.restart()
                batch, again = await learner.leased(version), await learner.leased(version)
                assert [t.key for t in again.trajectories] == [t.key for t in batch.trajectories]
                trained += [t.key for t in batch.trajectories]
                await learner.commit(version)
                await learner.publish(version + 1)
            assert len(set(trained)) == len(trained) == 3 * B

    run(test())
