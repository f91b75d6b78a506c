from __future__ import annotations

import math

import pytest

from slime_async.simulate.engine import Request, SimulatedEngine
from slime_async.simulate.scenario import EngineModel

STEP_S, PREFILL_S, REQUEST_S = 0.01, 0.002, 0.001


def engine(**changes: float) -> SimulatedEngine:
    return SimulatedEngine(EngineModel(step_s=((1.0, STEP_S),), **changes), {})


def test_requests_that_enter_together_share_a_prefill_which_gives_their_first_tokens() -> None:
    simulated = engine(prefill_s=PREFILL_S, request_s=REQUEST_S)
    for episode in range(3):
        simulated.submit(Request(episode, 5.0), 0.0)
    assert simulated.next_end_s() == pytest.approx(PREFILL_S + 3 * REQUEST_S + 4 * STEP_S)
    assert len(simulated.finish(simulated.next_end_s())) == 3


def test_what_runs_waits_for_the_prefill_of_what_enters() -> None:
    simulated = engine(prefill_s=PREFILL_S, request_s=REQUEST_S)
    simulated.submit(Request(0, 5.0), 0.0)
    before = simulated.next_end_s()
    simulated.submit(Request(1, 50.0), before - 1.5 * STEP_S)
    assert simulated.next_end_s() == pytest.approx(before + PREFILL_S + REQUEST_S)


def test_without_a_prefill_every_token_is_a_step() -> None:
    simulated = engine()
    simulated.submit(Request(0, 5.0), 0.0)
    assert simulated.next_end_s() == pytest.approx(5 * STEP_S)


def test_a_slower_machine_delays_what_is_left() -> None:
    simulated = engine()
    simulated.submit(Request(0, 4.0), 0.0)
    simulated.slow_down(2 * STEP_S, 1.5)
    assert simulated.next_end_s() == pytest.approx(2 * STEP_S + 1.5 * 2 * STEP_S)
    simulated.pause(2 * STEP_S, True)
    assert simulated.next_end_s() == math.inf


def crowded(*, wait_s: float) -> SimulatedEngine:
    """Eight run, none of which ends soon; one has run, which says how long others may wait."""
    simulated = engine(prefill_fraction=0.25, prefill_wait_s=wait_s)
    simulated.submit(Request(0, 10.0), 0.0)
    simulated.finish(10 * STEP_S)
    for episode in range(8):
        simulated.submit(Request(episode, 10.0 if episode == 0 else 50.0), 10 * STEP_S)
    assert simulated.running == 8
    return simulated


def test_requests_enter_in_bunches_as_at_an_actors_door() -> None:
    simulated = crowded(wait_s=60.0)
    simulated.submit(Request(8, 50.0), 16 * STEP_S)
    assert simulated.running == 8
    simulated.submit(Request(9, 50.0), 16 * STEP_S)
    assert simulated.running == 10
    simulated.submit(Request(10, 50.0), 16 * STEP_S)
    assert simulated.running == 10
    assert len(simulated.finish(simulated.next_end_s())) == 1  # nine are left, of which a quarter is two
    assert simulated.running == 9
    simulated.submit(Request(11, 50.0), 20 * STEP_S)
    assert simulated.running == 11


def test_places_of_a_full_engine_are_taken_in_bunches() -> None:
    simulated = engine(max_running=12, prefill_fraction=0.25, prefill_wait_s=60.0)
    simulated.submit(Request(0, 10.0), 0.0)
    now = simulated.next_end_s()
    assert len(simulated.finish(now)) == 1
    for episode in range(20):
        simulated.submit(Request(episode, 100.0 + 3 * episode), now)
    assert simulated.running == 12
    assert len(simulated.finish(simulated.next_end_s())) == 1
    assert simulated.running == 11  # a quarter of them is two
    assert len(simulated.finish(simulated.next_end_s())) == 1
    assert simulated.running == 12


@pytest.mark.parametrize(("wait_s", "waited_s"), [(2 * STEP_S, 2 * STEP_S), (60.0, 2 * 0.25 * 10 * STEP_S)])
def test_a_simulated_request_waits_at_the_door_for_so_long_at_most(wait_s: float, waited_s: float) -> None:
    simulated = crowded(wait_s=wait_s)
    simulated.submit(Request(8, 50.0), 10 * STEP_S)
    assert simulated.next_end_s() == pytest.approx(10 * STEP_S + waited_s)
    assert simulated.finish(simulated.next_end_s()) == []
    assert simulated.running == 9
    assert simulated.next_end_s() == pytest.approx(20 * STEP_S)


def test_who_waits_at_the_door_when_weights_change_is_not_forgotten() -> None:
    simulated = crowded(wait_s=STEP_S)
    simulated.submit(Request(8, 50.0), 10 * STEP_S)
    simulated.pause(10 * STEP_S, True)
    simulated.submit(Request(9, 50.0), 12 * STEP_S)
    assert simulated.running == 8
    simulated.pause(15 * STEP_S, False)
    assert simulated.running == 10


def test_fewer_than_a_bunch_wait_anew_after_a_pause() -> None:
    simulated = crowded(wait_s=STEP_S)
    simulated.submit(Request(8, 50.0), 10 * STEP_S)
    simulated.pause(10.5 * STEP_S, True)
    simulated.pause(15 * STEP_S, False)
    assert simulated.next_end_s() == pytest.approx(16 * STEP_S)
    simulated.finish(simulated.next_end_s())
    assert simulated.running == 9


@pytest.mark.parametrize(("pads", "context"), [(True, 40.0), (False, 20.0)])
def test_a_step_takes_longer_with_the_context_of_the_longest_or_the_mean_request(pads: bool, context: float) -> None:
    slope_s = STEP_S / 100
    simulated = SimulatedEngine(
        EngineModel(step_s=((1.0, STEP_S),), context=10.0, context_step_s=((1.0, slope_s),), pads=pads), {}
    )

    def seconds(first: float, steps: int) -> float:
        return sum(STEP_S + slope_s * (first + i + 0.5 - 10.0) for i in range(steps))

    simulated.submit(Request(0, 100.0), 0.0)
    now = seconds(0.0, 40)
    simulated.submit(Request(1, 20.0), now)
    assert simulated.next_end_s() == pytest.approx(now + seconds(context, 20))
    assert len(simulated.finish(simulated.next_end_s())) == 1
    simulated.submit(Request(2, 1.0), now + seconds(context, 20))
    begun_s = now + seconds(context, 20)
    assert simulated.next_end_s() == pytest.approx(begun_s + seconds(60.0 if pads else 30.0, 1))
    assert len(simulated.finish(simulated.next_end_s())) == 1
    left_s = simulated.next_end_s() - begun_s - seconds(60.0 if pads else 30.0, 1)
    assert left_s == pytest.approx(seconds(61.0, 39))


def test_an_engine_that_pads_computes_rows_of_requests_that_have_ended() -> None:
    model = EngineModel(step_s=((1.0, STEP_S), (101.0, 101 * STEP_S)), pads=True)
    simulated, now = SimulatedEngine(model, {}), 0.0
    for episode in range(100):
        simulated.submit(Request(episode, float(episode + 1)), 0.0)
    for running in range(100, 0, -1):
        rows = min(100, 8 + running * 3 // 2)
        now += rows * STEP_S
        assert simulated.next_end_s() == pytest.approx(now)
        assert len(simulated.finish(simulated.next_end_s())) == 1
    simulated.submit(Request(100, 1.0), now)
    assert simulated.next_end_s() == pytest.approx(now + STEP_S)
