"""Lengths and delays, drawn in blocks from a seed."""

from __future__ import annotations

import math

import numpy as np

from slime_async.simulate.scenario import LengthModel

BLOCK = 4096
"""Draws made at a time; one by one they cost more than the simulation"""


class Draws:
    """An endless sequence from one distribution."""

    def __init__(self, model: LengthModel, seed: int) -> None:
        self._model = model
        self._rng = np.random.default_rng(seed)
        self._block: list[float] = []

    def next(self) -> float:
        if not self._block:
            self._block = self._draw()
        return self._block.pop()

    def take(self, count: int) -> list[float]:
        return [self.next() for _ in range(count)]

    def mean(self) -> float:
        """Estimated from draws of its own."""
        return float(np.mean(Draws(self._model, 1)._draw()))

    def _draw(self) -> list[float]:
        model = self._model
        if model.measured:
            values = self._rng.choice(np.asarray(model.measured, dtype=np.float64), BLOCK)
        else:
            values = np.exp(self._rng.normal(math.log(model.median), model.sigma, BLOCK))
        drawn: list[float] = np.minimum(values, model.longest).tolist()
        return drawn
