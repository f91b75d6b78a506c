"""Objective and off-policy correction, as ``slime_async.correction`` computes them."""

from __future__ import annotations

from slime_async.config.base import Section


class AlgorithmConfig(Section):
    """Advantages, importance weights, rejection masks and the objective."""
