from __future__ import annotations

import asyncio
import logging

import pytest

from slime_async.protocol import (
    Batch,
    Commit,
    Drain,
    Durable,
    Eject,
    Ejected,
    EngineInfo,
    EnginesChanged,
    Evaluate,
    EvaluationResult,
    Finish,
    Granted,
    Lease,
    NotReady,
    Ok,
    PauseEngine,
    Published,
    Relay,
    Reservation,
    Shutdown,
)
from slime_async.trajectory import WeightId
from slime_async.transport.errors import RemoteError
from slime_async.transport.hub import LearnerLost
from tests.hub.players import SOURCES, WAIT_S, Actor, Learner, Stage, make_config, run, stage

B = 4
"""Trajectories per batch of ``make_config()``"""


async def begin(hub: Stage, slots: int = 100) -> tuple[Actor, Learner]:
    """One actor and the learner, version 0 published."""
    actor, learner = await hub.actor(slots=slots), await hub.learner()
    await learner.publish(0)
    return actor, learner


# ---------------------------------------------------------------------------------------------------- admission


def test_nothing_is_granted_before_the_first_publication() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await hub.actor(), await hub.learner()
            await actor.granted_nothing()
            await learner.publish(0)
            await actor.granted(2 * B)

    run(test())


@pytest.mark.parametrize("eta", [0, 2])
def test_grants_end_at_eta_plus_one_batches(eta: int) -> None:
    async def test() -> None:
        async with stage(make_config(eta=eta)) as hub:
            actor, _ = await begin(hub)
            await actor.granted((eta + 1) * B)

    run(test())


def test_grants_end_at_the_actors_slots() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, _ = await begin(hub, slots=3)
            first, *_ = await actor.granted(3)
            await actor.deliver(first)
            await actor.granted(1)

    run(test())


def test_a_batch_spreads_over_all_actors() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            a, b, learner = await hub.actor("a", 3), await hub.actor("b", 5), await hub.learner()
            await learner.publish(0)
            assert len({r.key for r in [*await a.granted(3), *await b.granted(5)]}) == 2 * B

    run(test())


def test_commit_and_publication_admit_the_next_batch() -> None:
    async def test() -> None:
        async with stage(make_config(eta=0)) as hub:
            actor, learner = await begin(hub)
            await actor.deliver_all(await actor.granted(B))
            await learner.leased(0)
            await learner.commit(0)
            await learner.commit(0)  # says the same again
            await actor.granted_nothing()
            await learner.publish(1)
            following = await actor.granted(B)
            assert {r.task.serial for r in following} == {2, 3}
            await actor.deliver_all(following, version=1)
            assert len((await learner.leased(1)).trajectories) == B

    run(test())


# ------------------------------------------------------------------------------------------ deliveries and leases


def test_a_delivery_is_accepted_once() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, _ = await begin(hub)
            reservation = (await actor.granted(2 * B))[0]
            assert await actor.deliver(reservation) == "accepted"
            assert await actor.deliver(reservation) == "duplicate"

    run(test())


def test_a_lease_waits_until_the_last_group_is_complete() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await begin(hub)
            *most, last = (await actor.granted(2 * B))[:B]
            await actor.deliver_all(most)
            lease = asyncio.create_task(learner.lease(0))
            await learner.status()
            assert not lease.done()
            assert await actor.deliver(last, reward=0.25) == "accepted"
            batch = await lease
            assert isinstance(batch, Batch)
            assert [t.key for t in batch.trajectories] == [r.key for r in [*most, last]]
            assert batch.trajectories[-1].reward == 0.25
            again = await learner.leased(0)
            assert [t.key for t in again.trajectories] == [t.key for t in batch.trajectories]

    run(test())


def test_a_lease_that_waited_in_vain_says_what_is_missing() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await begin(hub)
            await actor.deliver((await actor.granted(2 * B))[0])
            reply = await learner.lease(0, wait_s=0.05)
            assert isinstance(reply, NotReady)
            assert "0 of 2 groups complete; 7 trajectories with 1 actor" in reply.reason

    run(test())


def test_a_failed_attempt_is_granted_again_and_its_reason_told() -> None:
    async def test() -> None:
        async with stage(make_config(eta=0)) as hub:
            actor, learner = await begin(hub)
            first, *others = await actor.granted(B)
            await actor.fail(first, "environment broke")
            (again,) = await actor.granted(1)
            assert again == Reservation(first.task, first.sample, first.attempt + 1)
            assert "environment broke" in str((await learner.status()).queue["waiting_for"])
            await actor.deliver_all([again, *others])
            await learner.leased(0)

    run(test())


def test_a_trajectory_over_the_limit_is_refused_and_its_sample_stays_granted() -> None:
    async def test() -> None:
        async with stage(make_config(max_trajectory_bytes=100)) as hub:
            actor, _ = await begin(hub)
            reservation = (await actor.granted(2 * B))[0]
            with pytest.raises(RemoteError, match="more than max_trajectory_bytes = 100: raise the limit"):
                await actor.deliver(reservation)
            await actor.fail(reservation, "too large")
            assert [r.key for r in await actor.granted(1)] == [reservation.key]

    run(test())


def test_leases_out_of_order_are_refused() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            _, learner = await begin(hub)
            with pytest.raises(RemoteError, match="version 7 cannot be leased now"):
                await learner.lease(7)
            with pytest.raises(RemoteError, match="learner incarnation 2 is not the present one"):
                await learner.call(Lease(2, 0, 1.0))
            with pytest.raises(RemoteError, match="batch 0 cannot be committed"):
                await learner.call(Commit(1, 0))

    run(test())


def test_with_checkpoints_payloads_are_kept_until_one_is_durable() -> None:
    async def test() -> None:
        config = make_config()
        checkpoint = config.checkpoint.model_copy(update={"interval_steps": 2})
        async with stage(config.model_copy(update={"checkpoint": checkpoint})) as hub:
            actor, learner = await begin(hub)
            await actor.deliver_all(await actor.granted(2 * B))
            for version in range(2):
                await learner.leased(version)
                await learner.commit(version)
                await learner.publish(version + 1)
            assert (await learner.status()).queue["payloads_in_memory"] == 2 * B
            assert await learner.call(Durable(1, 1)) == Ok()
            assert (await learner.status()).queue["payloads_in_memory"] == B
            assert await learner.call(Durable(1, 2)) == Ok()
            assert (await learner.status()).queue["payloads_in_memory"] == 0
            with pytest.raises(RemoteError, match="learner incarnation 2 is not the present one"):
                await learner.call(Durable(2, 2))

    run(test())


def test_payloads_are_kept_no_longer_than_they_are_needed() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await begin(hub)
            await actor.deliver_all(await actor.granted(2 * B))
            await learner.leased(0)
            await learner.commit(0)
            assert (await learner.status()).queue["payloads_in_memory"] == 2 * B
            await learner.publish(1)
            assert (await learner.status()).queue["payloads_in_memory"] == B

    run(test())


# ----------------------------------------------------------------------------------------------------- life, death


def test_a_dead_actor_returns_its_reservations_to_the_living() -> None:
    async def test() -> None:
        async with stage(make_config(eta=0, heartbeat_timeout_s=0.4)) as hub:
            dying, learner = await begin(hub)
            held = await dying.granted(B)
            await dying.start(held[0])
            heir = await hub.actor("heir")
            await heir.granted_nothing()
            await learner.members(2)
            await dying.vanish()
            taken = await heir.granted(B)
            assert {(r.key, r.attempt) for r in taken} == {(r.key, r.attempt + 1) for r in held}
            assert [e.actor for e in await learner.members(1)] == ["heir"]
            await heir.deliver_all(taken)
            await learner.leased(0)

    run(test())


def test_the_learner_knows_every_engine_that_comes_and_goes() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            a = await hub.actor("a")
            learner = await hub.learner()
            assert learner.client.welcome.engines == (a.engine,)
            b = await hub.actor("b")
            assert await learner.members(2) == (a.engine, b.engine)
            await a.client.close()
            assert await learner.members(1) == (b.engine,)

    run(test())


def test_the_learner_hears_of_engines_that_die_and_come_back_within_an_actor() -> None:
    second_life = EngineInfo("a/engine.1", "a", 1)

    async def test() -> None:
        async with stage(make_config()) as hub:
            learner, actor = await hub.learner(), await hub.actor("a")
            assert await learner.members(1) == (actor.engine,)
            await actor.client.note(EnginesChanged(()))
            assert await learner.members(0) == ()
            await actor.client.note(EnginesChanged((second_life,)))
            assert await learner.members(1) == (second_life,)

    run(test())


def test_an_ejected_engine_is_no_member_any_more_and_its_actor_is_told() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            learner, a, b = await hub.learner(), await hub.actor("a"), await hub.actor("b")
            assert await learner.members(2) == (a.engine, b.engine)
            assert await learner.call(Eject(a.engine, "no answer")) == Ok()
            assert await learner.members(1) == (b.engine,)
            assert await a.hears(Ejected) == Ejected("a/engine", "no answer")
            assert await learner.call(Eject(a.engine, "once more")) == Ok()  # it is gone already

    run(test())


def test_actors_that_disagree_on_their_sources_are_refused_with_both_numbers() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await begin(hub)
            with pytest.raises(RemoteError, match="'train' holds 101 tasks here and 100 on the actors before"):
                await hub.actor("b", sources=SOURCES | {"train": 101})
            await actor.granted(2 * B)
            assert [p.name for p in (await learner.status()).peers] == ["a", "learner"]

    run(test())


def test_a_second_learner_is_refused() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            await hub.learner("first")
            with pytest.raises(RemoteError, match="learner first is still connected: a run has one; stop it first"):
                await hub.learner("second", incarnation=2)

    run(test())


def test_a_learner_that_was_refused_does_not_keep_the_place() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            with pytest.raises(RemoteError, match="incarnation -5 was replaced by -1"):
                await hub.learner("old", incarnation=-5)
            await (await hub.learner("new")).publish(0)

    run(test())


def test_the_death_of_a_learner_that_nobody_starts_again_ends_the_run_and_tells_everyone() -> None:
    async def test() -> None:
        config = make_config(heartbeat_timeout_s=0.4, learner={"max_restarts": 0})
        async with stage(config) as hub:
            actor, learner = await begin(hub)
            await learner.vanish()
            shutdown = await actor.hears(Shutdown)
            assert isinstance(shutdown, Shutdown)
            assert shutdown.failed
            assert "learner learner is gone" in shutdown.reason
            assert not hub.running.done()  # until those who were told have left
            await actor.client.close()
            with pytest.raises(LearnerLost, match=r"learner learner is gone \(.*\) before the run was finished"):
                await hub.running

    run(test())


def test_finish_ends_the_run_well_and_tells_everyone() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await begin(hub)
            assert await learner.call(Finish("all steps done")) == Ok()
            assert await actor.hears(Shutdown) == Shutdown("all steps done", failed=False)
            await actor.client.close()
            await learner.client.close()
            await hub.running

    run(test())


def test_a_peer_that_takes_no_messages_does_not_keep_the_hub_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime_async.transport.hub.GOODBYE_WAIT_S", 0.1)

    async def test() -> None:
        async with stage(make_config()) as hub:
            stuck, learner = await begin(hub)
            hub.hub._server.peers["a"].conversation.outbox._send = lambda _: False
            while hub.hub._server.note_nowait("a", Granted(())):
                pass
            assert await learner.call(Finish("done")) == Ok()
            await hub.running
            assert stuck.name == "a"

    run(test())


# ------------------------------------------------------------------------------------------- evaluation, draining


def test_an_evaluation_runs_beside_training_and_its_result_comes_back() -> None:
    async def test() -> None:
        async with stage(make_config(eta=0)) as hub:
            actor, learner = await begin(hub)
            training = await actor.granted(B)
            asked = asyncio.create_task(learner.call(Evaluate("before", "held-out", 3, WAIT_S)))
            evaluating = await actor.granted(3)
            assert [(r.evaluation, r.task.source, r.task.index) for r in evaluating] == [
                ("before", "held-out", i) for i in range(3)
            ]
            for reservation in reversed(evaluating):
                assert await actor.deliver(reservation, reward=reservation.task.index / 2) == "accepted"
            assert await asked == EvaluationResult("before", (0.0, 0.5, 1.0), 0, (0,))
            assert (await learner.status()).queue["payloads_in_memory"] == 0
            await actor.deliver_all(training)
            await learner.leased(0)

    run(test())


def test_an_evaluation_that_takes_too_long_says_what_it_lacks() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            _, learner = await begin(hub)
            with pytest.raises(RemoteError, match=r"before did not finish within 0 s.*'before' lacks 2 results"):
                await learner.call(Evaluate("before", "held-out", 2, 0.05))
            with pytest.raises(RemoteError, match="cannot evaluate 2 tasks of 'unknown'"):
                await learner.call(Evaluate("x", "unknown", 2, 1.0))

    run(test())


def test_draining_waits_for_what_runs_and_grants_nothing_until_the_publication() -> None:
    async def test() -> None:
        async with stage(make_config(eta=1)) as hub:
            actor, learner = await begin(hub, slots=B)
            running = await actor.granted(B)
            draining = asyncio.create_task(learner.call(Drain(WAIT_S)))
            await learner.status()
            *most, last = running
            await actor.deliver_all(most)
            await actor.granted_nothing()
            assert not draining.done()
            await actor.deliver(last)
            assert await draining == Ok()
            await actor.granted_nothing()  # the new weights come first
            await learner.leased(0)
            await learner.commit(0)
            await learner.publish(1)
            await actor.granted(B)

    run(test())


def test_a_drain_that_takes_too_long_fails_and_grants_go_on() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await begin(hub, slots=2)
            first, _ = await actor.granted(2)
            draining = asyncio.create_task(learner.call(Drain(0.1)))
            await learner.status()
            await actor.deliver(first)
            with pytest.raises(RemoteError, match="1 trajectories still run after"):
                await draining
            await actor.granted(1)

    run(test())


# ------------------------------------------------------------------------------------------------ relay, status


def test_commands_reach_the_actor_of_the_engine_and_its_reply_comes_back() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await hub.actor(), await hub.learner()
            pause = PauseEngine("a/engine", "in_place")
            assert await learner.call(Relay("a", pause, WAIT_S)) == Ok()
            assert await actor.hears(PauseEngine) == pause
            with pytest.raises(RemoteError, match="ConnectionLost: no peer named 'b' is connected"):
                await learner.call(Relay("b", pause, WAIT_S))

    run(test())


def test_the_status_shows_the_queue_and_everybody_connected() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            actor, learner = await begin(hub)
            await actor.granted(2 * B)
            learner.client.set_report({"phase": "rl"})
            observer = await hub.observer()
            status = await observer.status()
            while not any(peer.report for peer in status.peers):
                status = await observer.status()
            assert status.run_id == "run-1"
            assert (status.queue["reserved"], status.queue["published_version"]) == (2 * B, 0)
            assert [(p.role, p.name) for p in status.peers] == [
                ("actor", "a"),
                ("learner", "learner"),
                ("observer", "observer"),
            ]
            assert status.peers[1].report == {"phase": "rl"}

    run(test())


def test_calls_that_the_hub_does_not_answer_are_refused() -> None:
    async def test() -> None:
        async with stage(make_config()) as hub:
            learner = await hub.learner()
            with pytest.raises(RemoteError, match="Shutdown is no call that the hub answers"):
                await learner.call(Shutdown("now"))
            with pytest.raises(RemoteError, match="version 3 is ahead of the 0 batches trained"):
                await learner.call(Published(WeightId(1, 3)))

    run(test())


def test_a_stall_is_logged_with_what_everybody_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with stage(make_config(stall_s=0.05)) as hub:
            actor, _ = await begin(hub)
            await actor.granted(2 * B)
            caplog.clear()
            while not caplog.messages:
                await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "slime_async.transport.hub"):
        run(test())
    assert "nothing moved for 0 s: " in caplog.messages[0]
    assert "actors: admission closed by staleness 8 of 8" in caplog.messages[0]
    assert "0 of 2 groups complete; 8 trajectories with 1 actor" in caplog.messages[0]
