"""Adam's state by model parameter, whatever optimizer holds it: what a checkpoint that any layout can read is made of.

megatron-core's own sharded optimizer state depends on how many optimizers a layout chains (experts have their own under
expert parallelism) and on which kind they are. Seen per parameter it does not: plain and distributed optimizers, with
and without experts, read each other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from slime_async.learner.megatron.model import LearnerModel

ParameterState = dict[str, Tensor]
"""``exp_avg`` and ``exp_avg_sq``, and for parameters in less than fp32 ``main``; all in the parameter's shape"""

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "main"
"""The fp32 value that is updated"""
_DISTRIBUTED_MAIN = "param"
"""Its name in distributed optimizers"""


def parameter_states(model: LearnerModel) -> dict[Parameter, ParameterState]:
    """The state of this rank's parameters; a distributed optimizer's on the first rank of its group alone.

    A collective. Tensors of plain optimizers are their own: copy them before the next step.
    """
    _begin_moments(model)
    states: dict[Parameter, ParameterState] = {}
    for optimizer in _optimizers(model):
        states |= _gathered(optimizer) if isinstance(optimizer, DistributedOptimizer) else _owned(optimizer)
    return states


def blank_states(model: LearnerModel) -> dict[Parameter, ParameterState]:
    """Zeros in host memory, as ``parameter_states`` would have them on every rank, to be filled from a checkpoint."""
    return {p: {n: torch.zeros(p.shape) for n in _names(p)} for p in model.parameters()}


@torch.no_grad()
def set_parameter_states(model: LearnerModel, states: Mapping[Parameter, ParameterState], steps: int) -> None:
    """What ``parameter_states`` gave, into this model's optimizers, after ``steps`` steps of Adam.

    The model's own parameters are set before: fp32 ones are their own main value.
    """
    _begin_moments(model)
    for optimizer in _optimizers(model):
        if isinstance(optimizer, DistributedOptimizer):
            ordered = [p for buffer in optimizer.buffers for p in buffer.param_index_map]
            named = [{n: states[p][n] for n in MOMENTS} | {_DISTRIBUTED_MAIN: states[p].get(MAIN, p)} for p in ordered]
            optimizer.load_parameter_state_from_fully_reshardable(dict(enumerate(named)))
        else:
            for parameter, own in _owned(optimizer).items():
                for name, tensor in own.items():
                    tensor.copy_(states[parameter][name])
        _set_steps(optimizer.optimizer, steps)


def _names(parameter: Parameter) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype is torch.float32 else (*MOMENTS, MAIN)


def _owned(optimizer: Any) -> dict[Parameter, ParameterState]:
    """A plain optimizer's tensors, by model parameter."""
    if hasattr(optimizer, "float16_groups"):
        groups = (*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups)
    else:
        groups = tuple(group["params"] for group in optimizer.param_groups)
    states = {}
    for parameter in (p for group in groups for p in group):
        main = parameter if parameter.dtype is torch.float32 else parameter.main_param
        held = optimizer.optimizer.state[main] | {MAIN: main}
        states[parameter] = {name: held[name].detach() for name in _names(parameter)}
    return states


def _gathered(optimizer: Any) -> dict[Parameter, ParameterState]:
    """All shards of a distributed optimizer, on the first rank of its group; nothing on the others."""
    with _padding_counted(optimizer):
        whole = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False)
    states: dict[Parameter, ParameterState] = {}
    for index, buffer in enumerate(optimizer.buffers if whole is not None else ()):
        [flat] = whole[index].values()
        for parameter, (start, end, _) in buffer.param_index_map.items():
            sources = {name: _DISTRIBUTED_MAIN if name == MAIN else name for name in _names(parameter)}
            states[parameter] = {n: flat[source][start:end].view(parameter.shape) for n, source in sources.items()}
    return states


@contextmanager
def _padding_counted(optimizer: Any) -> Iterator[None]:
    """Mends the gathering of several buckets (tied embeddings and overlapped reduction make them).

    megatron-core 0.16.1 joins the buckets without the padding at their ends, but says where each parameter lies with
    it: whatever follows the first bucket is taken from a wrong place, and the end is missing.
    """
    parts = [part for buffer in optimizer.buffers for part in (buffer, *buffer.buckets)]
    unpadded = [part.numel_unpadded for part in parts]
    for buffer in optimizer.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for part, numel in zip(parts, unpadded, strict=True):
            part.numel_unpadded = numel


def _begin_moments(model: LearnerModel) -> None:
    """Give optimizers that have made no step yet the state they would begin with."""
    for optimizer in _optimizers(model):
        if not optimizer.optimizer.state:
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            _set_steps(optimizer.optimizer, 0)


def _set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Torch counts Adam's steps per parameter; fused optimizers of others do it per group."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                device = parameter.device if group.get("fused") else "cpu"
                optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=device)
    else:
        for group in optimizer.param_groups:
            group["step"] = steps


def _optimizers(model: LearnerModel) -> Iterator[Any]:
    """Megatron's, without those that have no parameter on this rank."""
    return (o for o in model.optimizer.chained_optimizers if not o.is_stub_optimizer)
