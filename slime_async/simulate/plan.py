"""Which split of a cluster between actors and learner is fastest, and with which η: simulated, not guessed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slime_async.simulate.cluster import simulate
from slime_async.simulate.draws import Draws
from slime_async.simulate.outcome import Outcome
from slime_async.simulate.scenario import Scenario

ENOUGH = 0.97
"""Of the fastest: the smallest η that reaches it is proposed, since older data costs more than it gains"""
TRIED_SPLITS = 6
"""Around the balance of rates; the simulation decides among them"""
DEFAULT_STALENESS = (0, 1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One candidate and what it reached."""

    scenario: Scenario
    outcome: Outcome

    @property
    def learner_devices(self) -> int:
        return self.scenario.learner.devices

    @property
    def actor_devices(self) -> int:
        return self.scenario.engines * self.scenario.engine.devices

    def line(self) -> str:
        where = "all, in turns" if self.scenario.colocated else f"{self.learner_devices}:{self.actor_devices}"
        o = self.outcome
        return (
            f"{where:>14}  η {self.scenario.max_staleness}  {o.samples_per_s:>10,.4g} samples/s  learner busy "
            f"{o.learner_busy:>4.0%}  engines {o.engines_full:>4.0%} of full  staleness {o.staleness_mean:.2f}"
        )


def splits(base: Scenario, devices: int) -> list[tuple[int, int]]:
    """(learner's devices, engines) around where both sides' rates are equal, the learner's in steps of its least."""
    unit, engine = base.learner.devices, base.engine.devices
    tokens = Draws(base.lengths, base.seed).mean() * base.turns
    full = base.engine.max_running / base.engine.step_with(base.engine.max_running)
    per_engine = full / tokens
    per_unit = 1 / ((tokens + base.prompt_tokens) * base.learner.token_s)
    found = []
    for learners in range(unit, devices - engine + 1, unit):
        engines = (devices - learners) // engine
        balance = (per_unit * learners / unit) / (per_engine * engines)
        found.append((max(balance, 1 / balance), learners, engines))
    return [(learners, engines) for _, learners, engines in sorted(found)[:TRIED_SPLITS]]


def candidates(base: Scenario, devices: int, staleness: Sequence[int]) -> Iterator[Scenario]:
    """Scenarios on exactly these devices; ``base.learner`` holds for ``base.learner.devices`` of them, and its time
    per token shrinks in proportion."""
    unit = base.learner
    found = splits(base, devices)
    if not found:
        raise ValueError(
            f"{devices} devices hold no learner of {unit.devices} and engine of {base.engine.devices}: give more, or a "
            "smaller model"
        )
    for learners, engines in found:
        learner = unit.model_copy(update={"devices": learners, "token_s": unit.token_s * unit.devices / learners})
        for eta in staleness:
            changes = {"learner": learner, "engines": engines, "max_staleness": eta, "colocated": False}
            yield base.model_copy(update={**changes, "name": f"{learners}:{devices - learners}, η {eta}"})
    if 0 in staleness:
        whole = unit.model_copy(update={"devices": devices, "token_s": unit.token_s * unit.devices / devices})
        changes = {"learner": whole, "engines": devices // base.engine.devices, "max_staleness": 0, "colocated": True}
        yield base.model_copy(update={**changes, "name": "colocated"})


def plan(base: Scenario, devices: int, staleness: Sequence[int] = DEFAULT_STALENESS) -> tuple[Proposal, list[Proposal]]:
    """The proposal, and everything that was tried, fastest first."""
    tried = [Proposal(scenario, simulate(scenario)) for scenario in candidates(base, devices, staleness)]
    tried.sort(key=lambda proposal: -proposal.outcome.samples_per_s)
    enough = [p for p in tried if p.outcome.samples_per_s >= ENOUGH * tried[0].outcome.samples_per_s]
    return min(enough, key=lambda p: (p.scenario.max_staleness, -p.outcome.samples_per_s)), tried
