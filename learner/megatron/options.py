"""The ``[megatron]`` section: sorted into Megatron's three configs, and refused where it cannot work.

Pure functions of the options, the world size and the model's shape, so that a wrong layout is reported before any
process starts. Not every field may be set: what follows from the checkpoint, from our own sections or from how the
learner drives Megatron has one place, and the refusal names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from slime_async.config.errors import ConfigError
from slime_async.learner.megatron.architecture import Architecture
from slime_async.learner.megatron.reserved import RESERVED


@dataclass(frozen=True, slots=True)
class Layout:
    """How ``world_size`` ranks divide the work."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Chunks of layers per pipeline stage; several are interleaved"""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def data(self) -> int:
        """Data-parallel ranks: each takes its own sequences."""
        return self.world_size // (self.tensor * self.pipeline * self.context)


@dataclass(frozen=True, slots=True)
class MegatronOptions:
    """The options, each for the config that has such a field (some go to two)."""

    layout: Layout
    model: dict[str, Any]
    ddp: dict[str, Any]
    optimizer: dict[str, Any]


def parse_options(options: Mapping[str, Any], world_size: int) -> MegatronOptions:
    """Sort options by config. Raises ``ConfigError`` for names and values that Megatron or the learner cannot take."""
    by_config = {config: {f.name: f.default for f in fields(config)} for config in _CONFIGS}
    known = {name for names in by_config.values() for name in names}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known - RESERVED.keys(), 1)
            hint = (
                f"did you mean '{near[0]}'?" if near else "it is no field of Megatron's model, DDP or optimizer config"
            )
            raise ConfigError(f"megatron.{name}: {hint}")
        if name in RESERVED:
            raise ConfigError(f"megatron.{name} cannot be set: {RESERVED[name]}")
        for names in by_config.values():
            _check_type(name, value, names.get(name))
    model, ddp, optimizer = ({k: v for k, v in options.items() if k in by_config[config]} for config in _CONFIGS)
    tensor = options.get("tensor_model_parallel_size", 1)
    layout = Layout(
        world_size=world_size,
        tensor=tensor,
        pipeline=options.get("pipeline_model_parallel_size", 1),
        virtual=options.get("virtual_pipeline_model_parallel_size", 1),
        context=options.get("context_parallel_size", 1),
        expert=options.get("expert_model_parallel_size", 1),
        expert_tensor=options.get("expert_tensor_parallel_size", tensor),
    )
    return MegatronOptions(layout, model, ddp, optimizer)


def with_recomputed_norms(options: MegatronOptions) -> MegatronOptions:
    """Megatron's part of ``learner.recompute_elementwise``. Raises ``ConfigError`` beside its own recomputation."""
    if "recompute_granularity" in options.model:
        raise ConfigError(
            f"learner.recompute_elementwise = true and megatron.recompute_granularity = "
            f"'{options.model['recompute_granularity']}' exclude each other: choose one"
        )
    norms = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
    return replace(options, model=options.model | norms)


_CONFIGS = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)


def _check_type(name: str, value: object, default: object) -> None:
    """Numbers and switches must be of their default's kind; other fields are Megatron's to check."""
    wanted = type(default)
    if wanted not in (bool, int, float, str):
        return
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise ConfigError(f"megatron.{name} = {value!r} must be of type {wanted.__name__}")


def check_layout(layout: Layout, model: Architecture, options: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` with the numbers that clash when this model cannot be laid out so."""
    tensor, pipeline, context, expert = layout.tensor, layout.pipeline, layout.context, layout.expert
    ranks = tensor * pipeline * context
    _require(
        min(tensor, pipeline, layout.virtual, context, expert, layout.expert_tensor) >= 1,
        "parallel sizes must be at least 1",
    )
    _require(
        layout.world_size % ranks == 0,
        f"{layout.world_size} ranks cannot be divided by tensor {tensor} × pipeline {pipeline} × context {context} "
        f"= {ranks}: set learner.ranks to a multiple of {ranks}",
    )
    for what, count in (("attention heads", model.heads), ("key/value heads", model.groups)):
        _require(count % tensor == 0, f"{count} {what} cannot be divided by tensor_model_parallel_size = {tensor}")
    _require(
        model.ffn_hidden_size % tensor == 0,
        f"intermediate_size {model.ffn_hidden_size} cannot be divided by tensor_model_parallel_size = {tensor}",
    )
    _require(
        model.layers % pipeline == 0,
        f"{model.layers} layers cannot be divided by pipeline_model_parallel_size = {pipeline}",
    )
    virtual = layout.virtual
    _require(
        virtual == 1 or pipeline > 2,  # of two stages each is both neighbours of the other, and Megatron mixes them up
        f"virtual_pipeline_model_parallel_size = {virtual} interleaves three stages or more: set "
        f"pipeline_model_parallel_size (now {pipeline}) above 2",
    )
    _require(
        model.layers % (pipeline * virtual) == 0,
        f"{model.layers} layers cannot be divided by pipeline_model_parallel_size {pipeline} × "
        f"virtual_pipeline_model_parallel_size {virtual} = {pipeline * virtual}",
    )
    sequence_parallel = options.get("sequence_parallel", False)
    _require(
        not sequence_parallel or tensor > 1,
        "sequence_parallel = true needs tensor_model_parallel_size above 1, but it is 1",
    )
    balancing = options.get("moe_router_load_balancing_type", "none")
    _require(
        balancing in ("none", "aux_loss"),
        f"moe_router_load_balancing_type = {balancing!r}: the learner takes 'aux_loss' (per microbatch) or 'none'",
    )
    if model.experts is None:
        _require(expert == 1, f"expert_model_parallel_size = {expert}, but the model has no experts: set it to 1")
    else:
        _check_experts(layout, model.experts.count, model.experts.hidden_size, sequence_parallel)


def _check_experts(layout: Layout, count: int, hidden_size: int, sequence_parallel: bool) -> None:
    expert, expert_tensor = layout.expert, layout.expert_tensor
    _require(count % expert == 0, f"{count} experts cannot be divided by expert_model_parallel_size = {expert}")
    _require(
        hidden_size % expert_tensor == 0,
        f"moe_intermediate_size {hidden_size} cannot be divided by expert_tensor_parallel_size = {expert_tensor}",
    )
    ranks = expert * expert_tensor * layout.pipeline
    _require(
        layout.world_size % ranks == 0,
        f"{layout.world_size} ranks cannot be divided by expert {expert} × expert tensor {expert_tensor} × pipeline "
        f"{layout.pipeline} = {ranks}",
    )
    _require(
        layout.tensor == 1 or sequence_parallel,
        f"a mixture of experts with tensor_model_parallel_size = {layout.tensor} needs sequence_parallel = true",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"[megatron] {message}")
