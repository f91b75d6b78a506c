"""Publications in which somebody dies, refuses or is late: nobody hangs, survivors agree, and the run goes on.

Each test prints how long the fault held the publication up (``pytest -rP`` shows it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import half_learner
import pytest
import torch
from publishing import DEADLINE_S, HubThread, Learner, MakeLearner, check_holds, engine_process, hub, make_learner
from publishing import snapshot as small_snapshot

from slime_async.learner.publisher import Snapshot
from slime_async.protocol import TensorSpec, WeightGroupSpec, WeightManifest
from slime_async.transport.weight_group import WeightGroup, WeightGroupError, host_group

__all__ = ["hub", "make_learner"]

ELEMENTS = 1 << 21
"""8 MB a tensor: more than sockets buffer, so that a broadcast cannot be over before its receivers took it"""


def large_snapshot(version: int) -> Snapshot:
    small = small_snapshot(version)
    padding = tuple(torch.full((ELEMENTS,), float(version)) for _ in range(3))
    specs = tuple(TensorSpec(f"padding{i}", "float32", (ELEMENTS,)) for i in range(3))
    manifest = WeightManifest((*small.manifest.tensors, *specs))
    return Snapshot(small.weights, manifest, (*small.tensors, *padding))


@contextmanager
def timed(what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - begun:.2f} s")


def publish(learner: Learner, version: int) -> None:
    assert learner.publisher is not None
    learner.publisher.publish(large_snapshot(version), DEADLINE_S)


def wait_published(learner: Learner, version: int) -> int:
    """How many engines took it."""
    assert learner.publisher is not None
    learner.publisher.wait_published(version, DEADLINE_S)
    return learner.publisher.take_times()[-1].engines


@pytest.mark.parametrize("point", ["PrepareWeights", "PauseEngine", "half", "taken", "ResumeEngine"])
def test_an_engine_killed_at_any_point_leaves_the_others_with_the_version(
    point: str, hub: HubThread, make_learner: MakeLearner
) -> None:
    survivors = [hub.engine("one"), hub.engine("other")]
    learner = make_learner()
    with engine_process(hub.hub, "victim", point) as victim:
        learner.wait_for_engines(3)
        publish(learner, 0)
        assert victim.stdout is not None
        assert victim.stdout.readline() == f"halted at {point}\n"
        victim.kill()
        with timed(f"an engine killed at {point}"):
            assert wait_published(learner, 0) == 2
    for engine in survivors:
        check_holds(engine, 0)
    learner.train(0)
    publish(learner, 1)
    assert wait_published(learner, 1) == 2
    for engine in survivors:
        check_holds(engine, 1)


@pytest.mark.parametrize("refused", ["PrepareWeights", "ReceiveWeights"])
def test_an_engine_that_answers_with_an_error_before_the_collective_is_asked_again(
    refused: str, hub: HubThread, make_learner: MakeLearner, caplog: pytest.LogCaptureFixture
) -> None:
    """What it refuses when it should receive leaves the other receiver in a broadcast until its deadline."""
    engines = [hub.engine("well"), hub.engine("refuses once", refusals=1, refused=refused)]
    learner = make_learner(timeout_s=3.0)
    learner.wait_for_engines(2)
    with timed(f"an engine that answered {refused} with an error"):
        publish(learner, 0)
        assert wait_published(learner, 0) == 2
    assert "ValueError: lm_head has another shape here" in caplog.text
    for engine in engines:
        check_holds(engine, 0)


@pytest.mark.parametrize("point", ["PauseEngine", "taken"])
def test_an_engine_that_answers_too_late_is_ejected_and_gets_the_version_when_it_comes_back(
    point: str, hub: HubThread, make_learner: MakeLearner, caplog: pytest.LogCaptureFixture
) -> None:
    punctual, late = hub.engine("punctual"), hub.engine("late", halt=point)
    learner = make_learner(timeout_s=0.5)
    learner.wait_for_engines(2)
    with timed(f"an engine that was late with {point}"):
        publish(learner, 0)
        hub.run(late.holds(0))
        hub.run(punctual.holds(0))
    assert "engine late/engine is ejected" in caplog.text
    check_holds(punctual, 0)
    check_holds(late, 0)
    learner.train(0)
    publish(learner, 1)
    assert wait_published(learner, 1) == 2
    check_holds(late, 1)


def test_a_lone_engine_that_died_comes_back_to_the_current_version_though_the_learner_waits_for_data(
    hub: HubThread, make_learner: MakeLearner
) -> None:
    learner = make_learner()
    with engine_process(hub.hub, "lone") as lone:
        publish(learner, 0)
        assert wait_published(learner, 0) == 1
        lone.kill()
        begun = time.monotonic()
        learner.wait_for_engines(0)
    back = hub.engine("lone.1")
    hub.run(back.holds(0))
    print(f"a lone engine from its death to its weights: {time.monotonic() - begun:.2f} s")
    check_holds(back, 0)
    learner.train(0)
    publish(learner, 1)
    assert wait_published(learner, 1) == 1


def test_engines_whose_learner_is_killed_in_mid_broadcast_give_up_and_follow_the_next() -> None:
    """At the latest at the group's deadline: gloo does not always notice that a sender is gone."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(Path(half_learner.__file__)), "3"]
    manifest = WeightManifest(
        tuple(TensorSpec(name, "float32", (half_learner.ELEMENTS,)) for name in ("first", "second", "third"))
    )
    with (
        subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as learner,
        ThreadPoolExecutor(3) as threads,
    ):
        assert learner.stdout is not None
        spec = WeightGroupSpec(**json.loads(learner.stdout.readline()))
        groups = list(threads.map(lambda rank: WeightGroup.create(spec, rank), (1, 2)))
        receiving = [threads.submit(group.receive, manifest) for group in groups]
        assert learner.stdout.readline() == "half\n"
        learner.kill()
        with timed("engines whose learner was killed"):
            errors = [call.exception(DEADLINE_S) for call in receiving]
        assert all(isinstance(error, WeightGroupError) for error in errors)

        spec, _store = host_group("weights", 2, 3, "gloo", 20.0)
        joining = [threads.submit(WeightGroup.create, spec, rank) for rank in (1, 2)]
        successor = WeightGroup.create(spec, 0)
        members = [call.result(DEADLINE_S) for call in joining]
        receiving = [threads.submit(group.receive, manifest) for group in members]
        sent = {tensor.name: torch.full(tensor.shape, 7.0) for tensor in manifest.tensors}
        successor.send(sent.items())
        for call in receiving:
            assert all(torch.equal(call.result(DEADLINE_S)[name], tensor) for name, tensor in sent.items())
        for group in (*groups, *members, successor):
            group.close()
