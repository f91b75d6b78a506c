from __future__ import annotations

import json
from dataclasses import replace

import pytest

from slime_async.bench.compare import HEADS, compare, quantiles, table
from slime_async.bench.contract import check_after, check_before
from slime_async.bench.measure import Measurement
from slime_async.bench.page import render
from slime_async.bench.saturated import Burst, EngineRate, SaturatedEngine, interpolate, rate_between
from tests.bench.examples import ENGINE, LEARNERS, measurement, modes

MODES = modes("colocated", "disaggregated", "async-2", "async-8")
MEASURED = [measurement(mode, step_s) for mode, step_s in zip(MODES, (2.0, 2.5, 1.25, 1.0), strict=True)]
COMPARISON = compare(MODES, MEASURED, ENGINE, LEARNERS)

OLDER = ("tokens_per_sample", "total_tokens_per_sample")


def test_the_headline_is_the_best_async_mode_of_moderate_staleness_over_the_better_synchronous_one() -> None:
    figures = COMPARISON.figures()
    assert (figures["best_sync_mode"], figures["best_async_mode"]) == ("colocated", "async-2")
    assert figures["async_over_best_sync"] == pytest.approx(2.0 / 1.25)
    assert figures["learner_wait_fraction"] == pytest.approx(0.19)


def test_the_bound_is_what_each_side_needs_alone() -> None:
    row = COMPARISON.row("async-2")
    assert (row.ideal.generate_s, row.ideal.train_s) == pytest.approx((1.0, 0.8))
    assert (row.ideal.overlapped_s, row.ideal.alternating_s) == pytest.approx((1.0, 1.8))
    assert row.ideal.bottleneck == "generation"
    assert row.of_ideal == pytest.approx(0.8)
    assert COMPARISON.figures()["bound_of_async_over_best_sync"] == pytest.approx(2.0)
    assert COMPARISON.figures()["of_ideal"] == pytest.approx(0.8)


def test_an_engine_that_was_faster_with_an_actor_sets_the_bound() -> None:
    fastest = 1.25 * ENGINE.tokens_per_s
    faster, slower = (
        compare(MODES, MEASURED, ENGINE, LEARNERS, EngineRate(64.0, rate)).row("async-2")
        for rate in (fastest, 0.5 * fastest)
    )
    assert (faster.ideal.generate_s, slower.ideal.generate_s) == pytest.approx((0.8, 1.0))


def test_shared_devices_have_the_ideal_of_all_of_them() -> None:
    ideal = COMPARISON.row("colocated").ideal
    assert (ideal.generate_s, ideal.train_s) == pytest.approx((0.5, 0.4))


def test_without_a_synchronous_mode_there_is_no_headline() -> None:
    assert compare(MODES, MEASURED[2:], ENGINE, LEARNERS).figures() == {}


def test_the_table_has_a_row_per_mode_and_a_column_per_head() -> None:
    lines = table(COMPARISON, target=0.5).splitlines()
    assert len(lines) == 2 + len(MEASURED)
    assert {line.count("|") for line in lines} == {len(HEADS) + 2}


def test_a_measurement_survives_json() -> None:
    for one in MEASURED:
        assert Measurement.from_plain(json.loads(json.dumps(one.to_plain()))) == one


def test_the_page_shows_every_mode_and_what_is_broken() -> None:
    clauses = check_after([*MEASURED[:3], measurement(MODES[3], 1.0, deaths=1)])
    html = render(COMPARISON, clauses, "sync <and> async", "2 devices")
    assert all(mode.name in html for mode in MODES)
    assert "sync &lt;and&gt; async" in html
    assert "BROKEN" in html


def test_a_fair_comparison_holds_every_clause() -> None:
    assert [clause for clause in check_after(MEASURED) if not clause.holds] == []


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"lengths": tuple(range(20, 120)) * 4}, "lengths come from one distribution"),
        ({"deaths": 2}, "nothing died"),
        ({"warmup_s": 0.0}, "warm-up is not counted"),
        ({"servers": "others"}, "the same warm servers for all modes"),
    ],
)
def test_what_makes_it_unfair_is_said(changes: dict[str, object], broken: str) -> None:
    first = [measurement(mode, 1.0, servers="these") if "servers" in changes else m for mode, m in _pairs()]
    clauses = check_after([*first, measurement(MODES[3], 1.0, **changes)])
    assert [clause.text for clause in clauses if not clause.holds] == [broken]


def test_a_configuration_that_departs_is_named_before_anything_runs(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    configs = {mode.name: {"learner.learning_rate": 1.0, "staleness.max_staleness": i} for i, mode in enumerate(MODES)}
    assert all(clause.holds for clause in check_before(MODES, configs, tmp_path))
    configs["async-8"]["learner.learning_rate"] = 2.0
    broken = [clause for clause in check_before(MODES, configs, tmp_path) if not clause.holds]
    assert any("learner.learning_rate" in clause.detail for clause in broken)


def test_a_modes_failure_breaks_the_contract() -> None:
    assert [c.text for c in check_after(MEASURED, ["async-4"]) if not c.holds] == ["every mode ran"]


def test_steps_between_measured_loads_are_interpolated() -> None:
    points = [(1.0, 1.0), (3.0, 2.0)]
    assert [interpolate(points, x) for x in (1, 2, 3, 5)] == [1.0, 1.5, 2.0, 3.0]
    assert interpolate(points[:1], 9) == 1.0


def test_quantiles_stand_for_a_distribution() -> None:
    assert quantiles(range(1000), 4) == [125, 375, 625, 875]
    assert quantiles([], 4) == []


def test_a_core_that_is_slower_in_one_mode_is_said_and_its_ideal_is_slower_too() -> None:
    speeds = [{"0": speed, "1": speed} for speed in (4.0, 4.0, 2.0)]
    measured = [measurement(m, 1.0, core_speeds=s) for m, s in zip(MODES[:3], speeds, strict=True)]
    [broken] = [clause for clause in check_after(measured) if not clause.holds]
    assert "equally fast" in broken.text
    assert "async-2 0.50" in broken.detail
    assert not [clause for clause in check_after(measured[:2]) if not clause.holds]
    engine = replace(ENGINE, rates=tuple(replace(rate, speed=4.0) for rate in ENGINE.rates))
    comparison = compare(MODES, measured, engine, {1: replace(LEARNERS[1], speed=2.0)})
    ideals = [comparison.row(mode.name).ideal for mode in MODES[:3]]
    assert [ideal.generate_s for ideal in ideals] == pytest.approx([0.5, 1.0, 2.0])
    assert [ideal.train_s for ideal in ideals] == pytest.approx([0.2, 0.4, 0.8])


def _pairs() -> list[tuple[object, Measurement]]:
    return list(zip(MODES[:3], MEASURED[:3], strict=True))


def test_a_saturated_engine_survives_json_and_older_results_have_no_bursts() -> None:
    engine = SaturatedEngine(ENGINE.rates, 100.0, 120.0, 50.0, (Burst(8, 75, 1.5),))
    assert SaturatedEngine.from_plain(json.loads(json.dumps(engine.to_plain()))) == engine
    older = {name: value for name, value in ENGINE.to_plain().items() if name in ("rates", *OLDER)}
    assert SaturatedEngine.from_plain(older).bursts == ()


def test_a_learners_rate_is_that_of_the_time_in_which_an_engine_was_measured() -> None:
    batches = [(1.0, 100.0), (2.0, 100.0), (4.0, 100.0), (6.0, 100.0)]
    assert rate_between(batches, 1.5, 2.0) == pytest.approx(100.0)
    assert rate_between(batches, 3.0, 5.0) == pytest.approx(50.0)
