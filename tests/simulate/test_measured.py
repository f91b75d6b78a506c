from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slime_async.cli.main import main
from slime_async.simulate.cluster import simulate
from slime_async.simulate.measured import check, scenario_of, steady_context
from slime_async.simulate.scenario import LearnerModel, LengthModel
from tests.bench.examples import bench_result

PREFILL_S, REQUEST_S, EPISODE_S, ANSWER = 0.003, 0.0002, 0.0005, 100


def step_s(running: float) -> float:
    return 0.005 + 0.0001 * running


def full_rate(running: float) -> float:
    """Tokens per second of an engine that is kept at so many requests."""
    entering = running / (ANSWER - 1)
    request_s = REQUEST_S + EPISODE_S + PREFILL_S * (1 - math.exp(-entering)) / entering
    return ANSWER / (request_s + (ANSWER - 1) * step_s(running) / running)


def measured() -> dict[str, Any]:
    """The result of a benchmark whose engine has exactly these costs."""
    result, full = bench_result(), 16
    bursts = [
        {"requests": n, "tokens": k, "seconds": PREFILL_S + n * REQUEST_S + (k - 1) * step_s(n)}
        for n in (1, 8, 16)
        for k in (50, 150)
    ]
    rates = [{"running": n, "tokens_per_s": full_rate(n)} for n in (1, 4, 8, full)]
    result["saturated"]["engine"] |= {"rates": rates, "bursts": bursts, "tokens_per_request": float(ANSWER)}
    rate = full_rate(full)
    result["saturated"]["delivering"] = {"running": full, "tokens_per_s": rate}
    result["saturated"]["side_by_side"] = {"1": {"engine_tokens_per_s": rate / 1.5, "learner_tokens_per_s": 1200.0}}
    result["saturated"]["engines_together"] = rate / 1.2
    return result


def test_bursts_tell_decoding_and_full_engines_what_entering_costs_together_and_each() -> None:
    engine = scenario_of(measured(), "async-2").engine
    assert dict(engine.step_s) == pytest.approx({n: step_s(n) for n in (1.0, 8.0, 16.0)})
    assert engine.prefill_s == pytest.approx(PREFILL_S, rel=1e-3)
    assert engine.request_s == pytest.approx(REQUEST_S + EPISODE_S, rel=1e-3)


def test_bursts_of_a_third_length_tell_what_longer_contexts_cost() -> None:
    result, slope_s = measured(), 2e-5
    bursts = result["saturated"]["engine"]["bursts"]
    contexts = [(n, 400, 150, 275 - 100) for n in (1, 8, 16)]  # beyond the mean of the first two, where step_s holds
    bursts += [
        {
            "requests": n,
            "tokens": k,
            "seconds": PREFILL_S + n * REQUEST_S + (after - 1) * step_s(n) + (k - after) * (step_s(n) + slope_s * more),
        }
        for n, k, after, more in contexts
    ]
    result["saturated"]["engine"]["bursts"] = sorted(bursts, key=lambda burst: burst["requests"])
    engine = scenario_of(result, "async-2").engine
    assert engine.context == 100
    assert dict(engine.step_s) == pytest.approx({n: step_s(n) for n in (1.0, 8.0, 16.0)})
    assert dict(engine.context_step_s) == pytest.approx(dict.fromkeys((1.0, 8.0, 16.0), slope_s))


@pytest.mark.parametrize("running", [1.0, 4.0, 64.0])
def test_the_longest_of_requests_that_are_replaced_as_they_end_is_that_of_a_simulation(running: float) -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(3.0, 0.9, 4096)), 100.0)
    ages = np.zeros(int(running))
    ends = rng.choice(lengths, int(running))
    longest = []
    for _ in range(40_000):
        ages += 1
        ended = ages >= ends
        ages[ended], ends[ended] = 0, rng.choice(lengths, int(ended.sum()))
        longest.append(ages.max())
    assert steady_context(np.sort(lengths), running) == pytest.approx(float(np.mean(longest[2000:])), rel=0.06)


def test_a_simulated_full_engine_is_as_fast_as_the_measured_one() -> None:
    result = measured()
    scenario = scenario_of(result, "async-2")
    changes = {
        "learner": LearnerModel(token_s=1e-9),
        "lengths": LengthModel(median=ANSWER, sigma=0.3, longest=1000),
        "max_staleness": 8,
        "publish_s": 0.0,
        "pause_s": 0.0,
        "delivery_s": 0.0,
    }
    outcome = simulate(scenario.model_copy(update=changes))
    assert outcome.sampled_tokens_per_s == pytest.approx(result["saturated"]["delivering"]["tokens_per_s"], rel=0.05)


def test_each_mode_is_slowed_by_what_computes_beside_it() -> None:
    result = measured()
    separate, shared = scenario_of(result, "async-2"), scenario_of(result, "colocated")
    assert (separate.engine.beside, separate.learner.beside) == pytest.approx((1.5, 2400 / 1200))
    assert (shared.engine.beside, shared.learner.beside) == pytest.approx((1.2, 1.0))


def test_rates_are_those_at_the_speed_that_cores_had_in_the_mode() -> None:
    result = measured()
    usual = scenario_of(result, "async-2")
    saturated = result["saturated"]
    saturated["engine"]["rates"] = [rate | {"speed": 4.0} for rate in saturated["engine"]["rates"]]
    saturated["engine"]["bursts"] = [burst | {"speed": 4.0} for burst in saturated["engine"]["bursts"]]
    saturated["delivering"]["speed"] = 4.0
    saturated["learner"]["1"]["speed"] = 6.0
    saturated["side_by_side"]["1"] |= {"engine_speed": 4.0, "learner_speed": 6.0}
    result["modes"]["async-2"]["core_speeds"] = {"0": 3.0, "1": 1.0}
    slower = scenario_of(result, "async-2")
    assert slower.learner.token_s == pytest.approx(2 * usual.learner.token_s)
    assert [s for _, s in slower.engine.step_s] == pytest.approx([4 * s for _, s in usual.engine.step_s])
    assert slower.engine.request_s == pytest.approx(4 * usual.engine.request_s)
    assert (slower.engine.beside, slower.learner.beside) == pytest.approx((usual.engine.beside, usual.learner.beside))


def test_a_result_of_several_workloads_is_checked_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"workloads": {"short": measured(), "long": measured()}}))
    assert [one.workload for one in check(json.loads(path.read_text()))] == ["short"] * 3 + ["long"] * 3
    assert main(["simulate", str(path)]) == 0
    assert "| long async-2 |" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{}", '{"modes": 3}', '{"modes": {"colocated": {}}}', "{"])
def test_what_is_no_result_of_a_benchmark_is_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    assert main(["simulate", str(path)]) == 2


def test_older_results_give_the_rates_of_each_side_alone() -> None:
    scenario = scenario_of(bench_result(), "async-2")
    assert scenario.engine.step_s == ((1.0, 1 / 200), (16.0, 0.01))
    assert (scenario.engine.beside, scenario.learner.beside, scenario.engine.prefills) == (1.0, 1.0, False)


def test_the_wait_of_a_batch_boundary_is_not_counted_twice() -> None:
    result = bench_result()
    result["modes"]["one-step-off"] = result["modes"]["async-2"] | {"publish_s": 0.5, "drain_s": 0.46}
    assert scenario_of(result, "one-step-off").publish_s == pytest.approx(0.04)
    result["modes"]["one-step-off"]["drain_s"] = None
    assert scenario_of(result, "one-step-off").publish_s == pytest.approx(0.01)
