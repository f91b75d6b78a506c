"""One optimizer step, and the state that it changes: saved, restored, begun anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime_async.learner.megatron.model import LearnerModel


def optimize(model: LearnerModel, accumulate_gradients: Callable[[], None], learning_rate: float) -> float:
    """One step on the gradients that ``accumulate_gradients`` leaves behind; their norm before clipping.

    Raises ``FloatingPointError`` when that norm is not finite: the weights are then lost.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    accumulate_gradients()
    for group in _parameter_groups(model):
        group["lr"] = learning_rate * group["lr_mult"]
        group["weight_decay"] = model.optimizer.config.weight_decay * group["wd_mult"]
    _, norm, _ = model.optimizer.step()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}: lower learner.learning_rate (now {learning_rate})")
    return float(norm)


@dataclass(frozen=True)
class TrainingState:
    """A copy, in memory, of everything that training changes on this rank."""

    parameters: list[Tensor]
    main_parameters: list[list[Tensor]]
    """Per torch optimizer: what it updates (fp32; shards under the distributed optimizer)"""
    moments: list[list[dict[str, Any]]]
    steps: int
    """Optimizer steps of the warm-up schedule"""
    learning_rate: float


@torch.no_grad()
def copy_state(model: LearnerModel, steps: int, learning_rate: float) -> TrainingState:
    optimizers = list(_torch_optimizers(model))
    return TrainingState(
        parameters=copy_parameters(model),
        main_parameters=[[p.detach().clone() for p in _parameters(o)] for o in optimizers],
        moments=[[_clone(o.state.get(p, {})) for p in _parameters(o)] for o in optimizers],
        steps=steps,
        learning_rate=learning_rate,
    )


@torch.no_grad()
def restore_state(model: LearnerModel, state: TrainingState) -> None:
    """Training goes on from ``state`` exactly as it did from there; the state may be restored again."""
    set_parameters(model, state.parameters)
    optimizers = list(_torch_optimizers(model))
    for optimizer, mains, moments in zip(optimizers, state.main_parameters, state.moments, strict=True):
        optimizer.state.clear()
        for parameter, main, moment in zip(_parameters(optimizer), mains, moments, strict=True):
            parameter.copy_(main)
            if moment:
                optimizer.state[parameter] = _clone(moment)


def forget_moments(model: LearnerModel) -> None:
    """The optimizer begins anew: no moments, step 0."""
    for optimizer in _torch_optimizers(model):
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group.pop("step", None)  # where fused optimizers keep it


@torch.no_grad()
def copy_parameters(model: LearnerModel) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def set_parameters(model: LearnerModel, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)


@contextmanager
def parameters_as(model: LearnerModel, values: Sequence[Tensor]) -> Iterator[None]:
    """For a forward pass with other weights; the model's own come back afterwards."""
    own = copy_parameters(model)
    set_parameters(model, values)
    try:
        yield
    finally:
        set_parameters(model, own)


def _torch_optimizers(model: LearnerModel) -> Iterator[torch.optim.Optimizer]:
    for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        if not optimizer.is_stub_optimizer:
            yield optimizer.optimizer


def _parameter_groups(model: LearnerModel) -> Iterator[dict[str, Any]]:
    for optimizer in _torch_optimizers(model):
        yield from optimizer.param_groups


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _clone(moments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in moments.items()}
