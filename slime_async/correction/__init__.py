"""Weights, masks, objectives and advantages: off-policy correction as pure torch functions.

The learner calls ``policy_loss`` per microbatch and ``group_advantages`` per batch; everything below them is usable
and tested alone. ``docs/off-policy.md`` says what each piece is for.
"""

from slime_async.correction.advantages import group_advantages
from slime_async.correction.aggregation import Denominators
from slime_async.correction.batch import BatchStatistics, PolicyBatch, batch_statistics
from slime_async.correction.diagnostics import MetricSums
from slime_async.correction.loss import PolicyLoss, policy_loss

__all__ = [
    "BatchStatistics",
    "Denominators",
    "MetricSums",
    "PolicyBatch",
    "PolicyLoss",
    "batch_statistics",
    "group_advantages",
    "policy_loss",
]
