from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slime_async.config import ConfigError
from slime_async.queue.prediction import predict_staleness
from slime_async.simulate.cluster import simulate
from slime_async.simulate.scenario import EngineModel, LearnerModel, LengthModel, Scenario

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "staleness_closed_form.json"


def scenario(**changes: Any) -> Scenario:
    base: dict[str, Any] = {
        "groups": 4,
        "group_size": 4,
        "slots": 64,
        "engine": EngineModel(max_running=64, step_s=((1.0, 0.01), (64.0, 0.02))),
        "learner": LearnerModel(token_s=1e-3),
        "lengths": LengthModel(median=40, sigma=0.8, longest=200),
        "steps": 40,
    }
    return Scenario(**{**base, **changes})


def test_synchronous_training_takes_the_sum_and_is_never_stale() -> None:
    lengths = LengthModel(median=50, sigma=0.0, longest=50)
    engine = EngineModel(max_running=64, step_s=((1.0, 0.01), (64.0, 0.01)))
    outcome = simulate(scenario(max_staleness=0, lengths=lengths, engine=engine, delivery_s=0.0, publish_s=0.05))
    generate_s, train_s = 50 * 0.01, 16 * 50 * 1e-3
    assert outcome.step_s == pytest.approx(generate_s + train_s + 0.05, rel=1e-3)
    assert outcome.staleness == {0: 1.0}
    assert outcome.learner_busy == pytest.approx(train_s / outcome.step_s, rel=1e-3)


def test_asynchronous_training_takes_what_the_slower_side_needs() -> None:
    outcome = simulate(scenario(max_staleness=4))
    tokens = outcome.sampled_tokens_per_s / outcome.samples_per_s
    assert outcome.step_s == pytest.approx(16 * tokens * 1e-3, rel=0.02)
    assert outcome.learner_busy > 0.98
    assert outcome.bottleneck == "training"


def test_more_staleness_is_never_slower_and_only_then_older() -> None:
    outcomes = [simulate(scenario(max_staleness=eta)) for eta in (0, 1, 2, 4)]
    speeds = [outcome.samples_per_s for outcome in outcomes]
    assert speeds == sorted(speeds) or max(speeds[i] / speeds[i + 1] for i in range(3)) < 1.02
    assert [outcome.staleness_mean for outcome in outcomes] == sorted(o.staleness_mean for o in outcomes)


def test_one_step_off_trains_only_on_the_version_before() -> None:
    outcome = simulate(scenario(max_staleness=1, publish="batch_boundary"))
    assert outcome.staleness == {1: 1.0}


def test_one_step_off_takes_training_or_generation_with_a_publication_after_the_drain() -> None:
    lengths = LengthModel(median=50, sigma=0.0, longest=50)
    engine = EngineModel(max_running=64, step_s=((1.0, 0.01), (64.0, 0.01)))
    given: dict[str, Any] = {"max_staleness": 1, "publish": "batch_boundary", "lengths": lengths, "engine": engine}
    for train_s, step_s in ((0.8, 0.8), (0.3, 0.5 + 0.05)):
        learner = LearnerModel(token_s=train_s / (16 * 50))
        outcome = simulate(scenario(**given, learner=learner, delivery_s=0.0, publish_s=0.05))
        assert outcome.step_s == pytest.approx(step_s, rel=1e-3)


def test_sides_that_take_from_each_other_are_slower_only_while_both_compute() -> None:
    beside = {
        "engine": EngineModel(max_running=64, step_s=((1.0, 0.01), (64.0, 0.02)), beside=1.5),
        "learner": LearnerModel(token_s=1e-3, beside=1.25),
    }
    synchronous, asynchronous = (
        [simulate(scenario(max_staleness=eta, **changes)).step_s for changes in ({}, beside)] for eta in (0, 4)
    )
    assert synchronous[1] == pytest.approx(synchronous[0])
    assert asynchronous[1] == pytest.approx(1.25 * asynchronous[0], rel=0.03)


def test_colocated_devices_take_turns() -> None:
    outcome = simulate(scenario(max_staleness=0, colocated=True, engines=2))
    assert outcome.devices == 2
    assert outcome.learner_busy + outcome.engines_busy <= 1.0
    with pytest.raises(ValueError, match="colocated = true needs max_staleness = 0"):
        scenario(max_staleness=1, colocated=True)


def test_the_same_seed_gives_the_same_outcome() -> None:
    assert simulate(scenario()) == simulate(scenario())
    assert simulate(scenario()) != simulate(scenario(seed=1))


def test_dead_engines_cost_throughput_and_nothing_is_lost() -> None:
    engine = EngineModel(max_running=8, step_s=((1.0, 0.02), (8.0, 0.03)))
    failing = engine.model_copy(update={"mean_time_between_failures_s": 30.0, "restart_s": 10.0})
    well, ill = (simulate(scenario(engines=4, slots=8, engine=e, max_staleness=2)) for e in (engine, failing))
    assert ill.failures > 0
    assert ill.returned > 0
    assert ill.samples_per_s < well.samples_per_s


def test_environments_leave_the_engine_to_others() -> None:
    slow = LengthModel(median=2.0, sigma=0.5, longest=5.0)
    synchronous, ahead = (
        simulate(scenario(max_staleness=eta, turns=3, environment_s=slow, slots=256)) for eta in (0, 4)
    )
    assert ahead.samples_per_s > 2 * synchronous.samples_per_s


def test_where_the_learner_is_faster_staleness_is_the_closed_forms() -> None:
    """Without pacing, with queues that never fill: the published form and an independent simulator agree with ours."""
    cases = [case for case in json.loads(REFERENCE.read_text())["cases"] if case["rho"] < 0.95]
    assert cases
    for case in cases[:4]:
        outcome = simulate(unpaced(case))
        closed = predict_staleness(
            slots=case["concurrency_C"],
            batch=case["batch_samples_B"],
            queue_batches=case["queue_factor_q"],
            rate_ratio=case["rho"],
            tail_factor=case["M_tail"],
        )
        assert outcome.group_age_mean == pytest.approx(case["sim"]["staleness"], rel=0.1)
        assert outcome.group_age_mean == pytest.approx(closed.total, rel=0.1)


def unpaced(case: dict[str, Any]) -> Scenario:
    """Every slot at a rate of its own, a learner whose speed is the slots' over ρ."""
    slots, batch, size = case["concurrency_C"], case["batch_samples_B"], case["group_S"]
    sigma = case["lognormal_sigma"]
    mean = 1000.0 * float(2.718281828459045 ** (sigma**2 / 2))
    produced_per_s = slots / (mean * 1e-3)
    return Scenario(
        groups=batch // size,
        group_size=size,
        max_staleness=64,
        on_stale="train",
        queue_trajectories=10**9,
        slots=slots,
        engine=EngineModel(max_running=slots, step_s=((1.0, 1e-3),)),
        learner=LearnerModel(fixed_s=batch / (produced_per_s / case["rho"]), token_s=1e-12),
        lengths=LengthModel(median=1000, sigma=sigma, longest=1e9),
        delivery_s=0.0,
        publish_s=0.0,
        pause_s=0.0,
        steps=160,
        warmup_steps=40,
    )


def test_a_scenarios_mistakes_are_told() -> None:
    from slime_async.cli.simulate import load_scenario

    with pytest.raises(ConfigError, match="no configuration file"):
        load_scenario(Path("none.toml"))


def test_work_spreads_over_all_of_many_actors() -> None:
    fast = LearnerModel(token_s=1e-6)
    outcome = simulate(scenario(groups=64, learner=fast, engines=48, slots=16, max_staleness=8, steps=30))
    assert outcome.engines_busy > 0.9
