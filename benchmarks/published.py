"""What others published about synchronous and asynchronous training, as inputs and expectations for the simulator.

Only what is printed is taken over; everything that a table does not say (length distributions, decoding speeds) is an
assumption, named here, and fitted to one printed number where it says "fitted".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slime_async.simulate.cluster import simulate
from slime_async.simulate.scenario import EngineModel, LearnerModel, LengthModel, Scenario

FITTED_TO = 0.005
"""Relative: no printed number has more than three digits"""
MAX_TRIALS = 20
LONG_REASONING = LengthModel(median=6000, sigma=0.8, longest=28_000)
"""Assumed where answers are cut off at 27k or 28k tokens"""


@dataclass(frozen=True, slots=True)
class Expectation:
    """One printed number and the simulator's."""

    source: str
    what: str
    published: float
    simulated: float

    @property
    def error(self) -> float:
        return abs(self.simulated - self.published) / self.published


def areal() -> list[Expectation]:
    """AReaL (arXiv 2505.24298), 1.5B on 8 GPUs: tokens/s against η. Fitted: decoding speed to η = 0, the learner's to
    η = 16. Assumed: three quarters of the GPUs generate, batches of 512 answers."""
    printed = {0: 27.1e3, 1: 47.8e3, 2: 47.8e3, 4: 49.0e3, 8: 51.5e3, 16: 52.0e3}

    def scenario(speed: float, eta: int) -> Scenario:
        return Scenario(
            groups=32,
            group_size=16,
            max_staleness=eta,
            on_stale="train",
            engines=6,
            slots=256,
            engine=decoding(speed, 256),
            learner=LearnerModel(devices=2, token_s=1 / printed[16]),
            lengths=LONG_REASONING,
            publish_s=2.0,
            pause_s=2.0,
            steps=30 + eta,
            warmup_steps=10 + eta,
        )

    speed = fitted(lambda factor: simulate(scenario(factor, 0)).sampled_tokens_per_s, printed[0])
    return [
        Expectation(
            "AReaL", f"tokens/s at η = {eta}", printed[eta], simulate(scenario(speed, eta)).sampled_tokens_per_s
        )
        for eta in (1, 2, 4, 8)
    ]


def verl() -> list[Expectation]:
    """verl's fully asynchronous trainer, Qwen2.5-Math-7B on H20s, answers of up to 28k tokens, batches of 512 × 16:
    seconds per step. Fitted: decoding speed to the printed generation time of the colocated run on all GPUs. Taken
    over: the asynchronous run's update time. Asynchronous with half of the GPUs on each side."""
    printed = {32: (357.41, 269.80, 294.77), 64: (150.72, 156.98, 189.26), 128: (177.85, 113.16, 150.63)}
    found = []
    for gpus, (generate_s, update_s, step_s) in printed.items():

        def scenario(speed: float, gpus: int, update_s: float, eta: int) -> Scenario:
            return Scenario(
                groups=512,
                group_size=16,
                max_staleness=eta,
                on_stale="train",
                engines=gpus,
                slots=256,
                engine=decoding(speed, 256),
                learner=LearnerModel(fixed_s=update_s, token_s=1e-12),
                lengths=LONG_REASONING,
                publish_s=5.0,
                pause_s=5.0,
                steps=6,
                warmup_steps=2,
            )

        speed = fitted(
            lambda factor, gpus=gpus: 1 / (simulate(scenario(factor, gpus, 1e-3, 0)).step_s - 5.0),
            1 / generate_s,  # type: ignore[misc]
        )
        outcome = simulate(scenario(speed, gpus // 2, update_s, 1))
        found.append(Expectation("verl", f"s per step on {gpus // 2}:{gpus // 2} GPUs", step_s, outcome.step_s))
    return found


def vime() -> list[Expectation]:
    """vime, Qwen3-4B on 2+2 devices: 178 s per synchronous step of which training waits 54.6%, 104 s asynchronous.
    Fitted: decoding speed to the waiting. Assumed: batches of 256 answers of up to 16k tokens."""
    sync_s, wait, async_s = 178.0, 0.546, 104.0

    def scenario(speed: float, train_s: float, eta: int) -> Scenario:
        return Scenario(
            groups=32,
            group_size=8,
            max_staleness=eta,
            engines=2,
            slots=128,
            engine=decoding(speed, 128),
            learner=LearnerModel(devices=2, fixed_s=train_s, token_s=1e-12),
            lengths=LengthModel(median=4000, sigma=0.7, longest=16_384),
            publish_s=1.0,
            pause_s=1.0,
            steps=30,
            warmup_steps=10,
        )

    train_s = (1 - wait) * sync_s
    speed = fitted(lambda factor: 1 / simulate(scenario(factor, train_s, 0)).step_s, 1 / sync_s)
    return [Expectation("vime", "s per asynchronous step", async_s, simulate(scenario(speed, train_s, 2)).step_s)]


def decoding(speed: float, max_running: int) -> EngineModel:
    """Assumed shape: with a full engine a step takes three times what it takes for one request."""
    return EngineModel(max_running=max_running, step_s=((1.0, 0.01 / speed), (float(max_running), 0.03 / speed)))


def fitted(result: Callable[[float], float], wanted: float) -> float:
    """The speed at which ``result``, which grows with it, is as ``wanted``."""
    speed = 1.0
    for _ in range(MAX_TRIALS):
        reached = result(speed) / wanted
        if abs(reached - 1) < FITTED_TO:
            return speed
        speed /= reached
    raise RuntimeError(f"no decoding speed gives {wanted}: the last, {speed:g}, gives {reached:.3g} of it")
