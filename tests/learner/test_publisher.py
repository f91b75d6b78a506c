"""The publisher with a real hub and real gloo groups."""

from __future__ import annotations

import pytest
from publishing import DEADLINE_S, HubThread, MakeLearner, check_holds, engine_process, hub, make_learner, snapshot
from weight_engine import IN_FLIGHT, PHASES

from slime_async.config.schema import WeightsConfig
from slime_async.learner.publisher import PublishError
from slime_async.protocol import GetStatus, RunStatus

__all__ = ["hub", "make_learner"]


def test_every_version_arrives_at_every_engine(hub: HubThread, make_learner: MakeLearner) -> None:
    engines = [hub.engine("a"), hub.engine("b")]
    learner = make_learner()
    assert learner.publisher is not None
    for version in range(3):
        learner.publish(version)
        for engine in engines:
            check_holds(engine, version)
        learner.train(version)
    status = learner.client.call(GetStatus(), DEADLINE_S)
    assert isinstance(status, RunStatus)
    assert status.queue["published_version"] == 2
    times = learner.publisher.take_times()
    assert [t.weights.version for t in times] == [0, 1, 2]
    assert {(t.engines, t.requests_in_flight) for t in times} == {(2, 2 * IN_FLIGHT)}
    assert all(0 < t.broadcast_s <= t.pause_to_resume_s <= t.total_s for t in times)
    assert not learner.publisher.take_times()
    # the group is formed once, then every publication goes through the same phases
    assert engines[0].heard == ["PrepareWeights", "JoinWeightGroup", *PHASES, *["PrepareWeights", *PHASES] * 2]


@pytest.mark.parametrize(("a", "b"), [(True, True), (False, False), (True, False)])
def test_weights_go_in_buffers_where_every_engine_takes_them(
    a: bool, b: bool, hub: HubThread, make_learner: MakeLearner
) -> None:
    engines = [hub.engine("a", takes_buffers=a), hub.engine("b", takes_buffers=b)]
    make_learner().publish(0)
    for engine in engines:
        check_holds(engine, 0)
        assert engine.buffer_bytes == (WeightsConfig().buffer_bytes if a and b else 0)


def test_a_late_joiner_gets_the_current_version_though_nothing_new_is_published(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    first = hub.engine("first")
    learner = make_learner()
    learner.publish(0)
    late = hub.engine("late")
    hub.run(late.holds(0))
    check_holds(late, 0)
    check_holds(first, 0)
    learner.train(0)
    learner.publish(1)
    check_holds(late, 1)


def test_a_snapshot_waits_for_the_first_engine(hub: HubThread, make_learner: MakeLearner) -> None:
    learner = make_learner()
    assert learner.publisher is not None
    learner.publisher.publish(snapshot(0), DEADLINE_S)
    with pytest.raises(TimeoutError, match=r"waited 0 s for an engine to take version 0; engines known: \[\]"):
        learner.publisher.wait_published(0, 0.01)
    with pytest.raises(TimeoutError, match="waited 0 s for publication of version 1"):
        learner.publisher.publish(snapshot(1), 0.01)
    engine = hub.engine("a")
    learner.publisher.wait_published(0, DEADLINE_S)
    check_holds(engine, 0)


def test_a_killed_engine_does_not_keep_the_others_from_the_next_version(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    survivor = hub.engine("survivor")
    learner = make_learner()
    assert learner.publisher is not None
    with engine_process(hub.hub, "victim") as victim:
        learner.wait_for_engines(2)
        learner.publish(0)
        assert learner.publisher.take_times()[-1].engines == 2
        victim.kill()
        learner.train(0)
        learner.publish(1)
    check_holds(survivor, 1)
    assert learner.publisher.take_times()[-1].engines == 1
    assert survivor.heard[-3:] == PHASES
    learner.publisher.check()


def test_publishing_at_batch_boundaries_drains_first(hub: HubThread, make_learner: MakeLearner) -> None:
    engine = hub.engine("a")
    learner = make_learner("batch_boundary")
    for version in range(3):
        learner.publish(version)
        check_holds(engine, version)
        learner.train(version)


def test_a_publication_that_cannot_succeed_fails_and_says_what_the_engine_said(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    hub.engine("wrong", refusals=99)
    learner = make_learner(timeout_s=0.5)
    assert learner.publisher is not None
    learner.publisher.check()
    learner.publisher.publish(snapshot(0), DEADLINE_S)
    with pytest.raises(PublishError, match=r"version 0 .* in 5 attempts.*lm_head has another shape here"):
        learner.publisher.wait_published(0, DEADLINE_S)
    with pytest.raises(PublishError, match="the publisher failed"):
        learner.publisher.check()
    with pytest.raises(PublishError, match="the publisher failed"):
        learner.publisher.publish(snapshot(1), DEADLINE_S)


def test_engines_beside_the_learner_take_weights_out_of_its_memory(hub: HubThread, make_learner: MakeLearner) -> None:
    engines = [hub.engine("a"), hub.engine("b")]
    learner = make_learner(backend="ipc")
    learner.wait_for_engines(2)
    for version in range(3):
        learner.publish(version)
        for engine in engines:
            check_holds(engine, version)
        learner.train(version)
    assert "JoinWeightGroup" not in engines[0].heard


def test_an_engine_on_several_devices_cannot_share_the_learners_memory(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    hub.engine("wide", ranks=2)
    learner = make_learner(backend="ipc")
    with pytest.raises(PublishError, match="wide/engine has 2 ranks: use nccl"):
        learner.publish(0)
