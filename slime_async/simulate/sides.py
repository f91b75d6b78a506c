"""From a benchmark's result: what each side of one mode reaches by itself, and beside what else computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slime_async.bench.saturated import EngineRate, SaturatedEngine, SaturatedLearner, SideBySide


@dataclass(frozen=True, slots=True)
class Sides:
    """What each side of one mode reached, alone and beside others, at the speed of its cores in that mode."""

    engine: SaturatedEngine
    full: EngineRate
    """With an actor that delivers, where that was measured"""
    learner: SaturatedLearner | None
    """On as many devices as in the mode, where that was measured; so is the next"""
    side_by_side: SideBySide | None
    together: EngineRate | None

    @classmethod
    def of(cls, saturated: Mapping[str, Any], devices: int, engine_speed: float, learner_speed: float) -> Sides:
        """From a result; ``devices`` are the learner's."""
        engine = SaturatedEngine.from_plain(saturated["engine"]).at(engine_speed)
        delivering, together = saturated.get("delivering"), saturated.get("engines_together")
        if isinstance(together, float):  # of older results
            together = {"running": 0.0, "tokens_per_s": together}
        learner = saturated["learner"].get(str(devices))
        both = saturated.get("side_by_side", {}).get(str(devices))
        return cls(
            engine=engine,
            full=EngineRate(**delivering).at(engine_speed) if delivering else engine.full,
            learner=SaturatedLearner.from_plain(learner).at(learner_speed) if learner else None,
            side_by_side=SideBySide(**both).at(engine_speed, learner_speed) if both else None,
            together=EngineRate(**together).at(engine_speed) if together else None,
        )

    def engine_beside(self, colocated: bool) -> float:
        """How many times as long an engine takes beside what else computes; 1 where that was not measured."""
        if colocated:
            beside = self.together.tokens_per_s if self.together else 0.0
        else:
            beside = self.side_by_side.engine_tokens_per_s if self.side_by_side else 0.0
        return max(1.0, self.full.tokens_per_s / beside) if beside else 1.0

    def learner_beside(self, colocated: bool) -> float:
        """The same of the learner; engines that share its devices stand still while it computes."""
        if colocated or self.side_by_side is None or self.learner is None:
            return 1.0
        return max(1.0, self.learner.tokens_per_s / self.side_by_side.learner_tokens_per_s)
