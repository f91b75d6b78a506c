"""Megatron's auxiliary losses of routers beside a loss that is already over global denominators.

Megatron multiplies each router's loss by the tokens that it saw, and counts on a division by the tokens of the whole
batch afterwards, which the learner does not make. So the coefficients are divided beforehand: an auxiliary loss is then
its coefficient times the token-weighted mean over all microbatches, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
)
from torch import Tensor

from slime_async.learner.megatron.model import LearnerModel

NAMES = ("load_balancing_loss", "z_loss")
"""Megatron's, in the order of ``auxiliary_sums``"""


def has_auxiliary_losses(model: LearnerModel) -> bool:
    config = model.config
    balances = config.moe_router_load_balancing_type != "none" and config.moe_aux_loss_coeff > 0
    return model.architecture.experts is not None and (balances or bool(config.moe_z_loss_coeff))


@contextmanager
def auxiliary_losses_over(model: LearnerModel, tokens: int) -> Iterator[None]:
    """While one optimizer step's gradients are accumulated; ``tokens`` are those that all ranks compute for it."""
    config, layout = model.config, model.layout
    coefficients = config.moe_aux_loss_coeff, config.moe_z_loss_coeff
    if not has_auxiliary_losses(model):
        yield
        return
    clear_aux_losses_tracker()
    # tensor- (by sequence parallelism) and context-parallel ranks each see and weigh a part of the tokens
    scale = layout.tensor * layout.context / max(tokens, 1)
    config.moe_aux_loss_coeff = coefficients[0] * scale
    config.moe_z_loss_coeff = coefficients[1] * scale if coefficients[1] else coefficients[1]
    try:
        yield
    finally:
        config.moe_aux_loss_coeff, config.moe_z_loss_coeff = coefficients


def auxiliary_sums(model: LearnerModel, microbatches: int) -> dict[str, float]:
    """Before their coefficients, the mean over layers and microbatches of all ranks. A collective."""
    if not has_auxiliary_losses(model):
        return {}
    tracker, layout = get_moe_layer_wise_logging_tracker(), model.layout
    sums = torch.stack([_of_layers(tracker.get(name, {}), model) for name in NAMES])
    for group in (
        parallel_state.get_tensor_and_context_parallel_group(),
        parallel_state.get_data_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
    # a rank's share of the one loss is a summand, its part of the other a mean
    sums[1] /= layout.tensor * layout.context
    count = microbatches * layout.data * model.architecture.layers
    means = dict(zip(NAMES, (sums / count).tolist(), strict=True))
    return {f"router/{name}": value for name, value in means.items() if value}


def _of_layers(entry: dict[str, Tensor], model: LearnerModel) -> Tensor:
    return entry["values"].double().sum() if entry else torch.zeros((), dtype=torch.float64, device=model.device)
