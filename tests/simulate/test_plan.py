from __future__ import annotations

import json
from pathlib import Path

import pytest

from slime_async.cli.simulate import load_scenario
from slime_async.config import ConfigError
from slime_async.simulate.measured import check, scenario_of
from slime_async.simulate.plan import plan, splits
from slime_async.simulate.rates import DEVICES, ModelSize
from slime_async.simulate.scenario import EngineModel, LearnerModel, LengthModel, Scenario
from tests.bench.examples import bench_result

BASE = Scenario(
    groups=4,
    group_size=4,
    slots=16,
    engine=EngineModel(max_running=16, step_s=((1.0, 0.01), (16.0, 0.02))),
    learner=LearnerModel(token_s=5e-4),
    lengths=LengthModel(median=40, sigma=0.5, longest=200),
    steps=20,
    warmup_steps=5,
)


def test_the_proposal_uses_all_devices_and_nothing_tried_is_much_faster() -> None:
    best, tried = plan(BASE, 6, staleness=(0, 2, 4))
    assert best.learner_devices + best.actor_devices == 6
    assert best.outcome.samples_per_s >= 0.97 * max(p.outcome.samples_per_s for p in tried)
    assert any(p.scenario.colocated for p in tried)


def test_splits_begin_where_both_sides_are_equally_fast() -> None:
    learners, engines = splits(BASE, 8)[0]
    assert 1 < learners < 7
    assert learners + engines == 8


def test_devices_that_hold_no_engine_beside_the_learner_are_refused() -> None:
    with pytest.raises(ValueError, match="1 devices hold no learner"):
        plan(BASE, 1)


def test_larger_models_need_more_devices_and_longer_steps() -> None:
    h100 = DEVICES["h100"]
    small, large = ModelSize.of(1e9), ModelSize.of(70e9)
    assert small.engine_devices(h100) == 1 < large.engine_devices(h100)
    assert small.learner_devices(h100) < large.learner_devices(h100)
    step = small.engine(h100, 1000, 64).step_with
    assert step(1) < step(64)


def test_a_benchmarks_modes_become_scenarios_that_know_nothing_of_its_outcome() -> None:
    result = json.loads(json.dumps(bench_result()))
    asynchronous = scenario_of(result, "async-2")
    assert (asynchronous.engines, asynchronous.max_staleness, asynchronous.colocated) == (1, 2, False)
    assert asynchronous.engine.step_with(16) == pytest.approx(0.01)
    assert asynchronous.learner.token_s == pytest.approx(0.8 / 1920)
    assert scenario_of(result, "colocated").colocated
    assert [one.mode for one in check(result)] == ["colocated", "disaggregated", "async-2"]


def test_the_example_scenario_is_sound_and_settings_go_over_it() -> None:
    path = Path(__file__).parents[2] / "examples" / "bench" / "cluster.toml"
    scenario = load_scenario(path, ["engines=2", "engine.max_running=8"])
    assert (scenario.engines, scenario.engine.max_running, scenario.learner.devices) == (2, 8, 16)
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_scenario(path, ["engines"])
    with pytest.raises(ConfigError, match="enginess"):
        load_scenario(path, ["enginess=2"])
