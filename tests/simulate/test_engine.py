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
