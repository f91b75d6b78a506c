"""The ``[megatron]`` section: sorted into Megatron's three configs, and refused where it cannot work.

Pure functions of the options, the world size and the model's shape, so that a wrong layout is reported before any
process starts. Not every field may be set: what follows from the checkpoint, from our own sections or from how the
learner drives Megatron has one place, and the refusal names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from slime_async.learner.megatron.architecture import Architecture

_FROM_CHECKPOINT = "it follows from the checkpoint's config.json"
_FROM_LEARNER = "the learner sets it"
_NOT_SUPPORTED = "the learner does not support it"

_OWNED: dict[str, str] = {
    **dict.fromkeys(
        "num_layers hidden_size num_attention_heads num_query_groups kv_channels ffn_hidden_size layernorm_epsilon "
        "normalization gated_linear_unit activation_func add_bias_linear add_qkv_bias qk_layernorm num_moe_experts "
        "moe_router_topk moe_ffn_hidden_size moe_router_pre_softmax moe_router_score_function moe_layer_freq "
        "multi_latent_attention rotary_interleaved".split(),
        _FROM_CHECKPOINT,
    ),
    **dict.fromkeys("params_dtype bf16 fp16 pipeline_dtype".split(), "set model.dtype"),
    **dict.fromkeys("lr min_lr decoupled_lr decoupled_min_lr".split(), "set learner.learning_rate"),
    **{f"adam_{x}": f"set learner.adam_{x}" for x in ("beta1", "beta2", "eps")},
    **{x: f"set learner.{x}" for x in ("weight_decay", "clip_grad")},
    **dict.fromkeys(
        "calculate_per_token_loss variable_seq_lengths use_cpu_initialization perform_initialization timers "
        "finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func".split(),
        _FROM_LEARNER,
    ),
    **dict.fromkeys("hidden_dropout attention_dropout".split(), "dropout would make importance ratios random"),
    **dict.fromkeys(
        "moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff".split(),
        "an auxiliary loss would be added to the policy's without a denominator",
    ),
    **dict.fromkeys(
        "virtual_pipeline_model_parallel_size use_megatron_fsdp use_custom_fsdp mtp_num_layers "
        "heterogeneous_block_specs average_in_collective moe_expert_capacity_factor hybrid_context_parallel "
        "overlap_param_gather align_param_gather overlap_param_gather_with_optimizer_step "
        "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage pipeline_model_parallel_layout".split(),
        _NOT_SUPPORTED,
    ),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """How ``world_size`` ranks divide the work."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
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
    """Sort options by config. Raises ``ValueError`` for names and values that Megatron or the learner cannot take."""
    by_config = {config: {f.name: f.default for f in fields(config)} for config in _CONFIGS}
    known = {name for names in by_config.values() for name in names}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known - _OWNED.keys(), 1)
            hint = f"did you mean '{near[0]}'?" if near else "it is no field of Megatron's model, DDP or optimizer config"
            raise ValueError(f"megatron.{name}: {hint}")
        if name in _OWNED:
            raise ValueError(f"megatron.{name} cannot be set: {_OWNED[name]}")
        for names in by_config.values():
            _check_type(name, value, names.get(name))
    model, ddp, optimizer = ({k: v for k, v in options.items() if k in by_config[config]} for config in _CONFIGS)
    tensor = options.get("tensor_model_parallel_size", 1)
    layout = Layout(
        world_size=world_size,
        tensor=tensor,
        pipeline=options.get("pipeline_model_parallel_size", 1),
        context=options.get("context_parallel_size", 1),
        expert=options.get("expert_model_parallel_size", 1),
        expert_tensor=options.get("expert_tensor_parallel_size", tensor),
    )
    return MegatronOptions(layout, model, ddp, optimizer)


_CONFIGS = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)


def _check_type(name: str, value: object, default: object) -> None:
    """Numbers and switches must be of their default's kind; other fields are Megatron's to check."""
    wanted = type(default)
    if wanted not in (bool, int, float, str):
        return
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise ValueError(f"megatron.{name} = {value!r} must be of type {wanted.__name__}")


def check_layout(layout: Layout, model: Architecture, options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` with the numbers that clash when this model cannot be laid out so."""
    tensor, pipeline, context, expert = layout.tensor, layout.pipeline, layout.context, layout.expert
    ranks = tensor * pipeline * context
    _require(min(tensor, pipeline, context, expert, layout.expert_tensor) >= 1, "parallel sizes must be at least 1")
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
    sequence_parallel = options.get("sequence_parallel", False)
    _require(
        not sequence_parallel or tensor > 1,
        "sequence_parallel = true needs tensor_model_parallel_size above 1, but it is 1",
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
        raise ValueError(f"[megatron] {message}")
