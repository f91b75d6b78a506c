"""Builds one rank's part of the model: GPTModel, Megatron's DDP and optimizer, with Hugging Face weights loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime_async.config.schema import Config
from slime_async.learner.megatron import compat, weight_gradients
from slime_async.learner.megatron.architecture import Architecture
from slime_async.learner.megatron.attention import has_varlen_kernel
from slime_async.learner.megatron.gpt import PackedGPT, build_chunks
from slime_async.learner.megatron.layers import ValueHead, has_transformer_engine
from slime_async.learner.megatron.options import (
    Layout,
    MegatronOptions,
    check_layout,
    parse_options,
    with_recomputed_norms,
)
from slime_async.learner.megatron.parallel import initialize, world_size_from_environment
from slime_async.learner.megatron.replay import replay_in
from slime_async.learner.megatron.weights import WeightMap
from slime_async.telemetry.progress import Progress, silent


@dataclass(frozen=True)
class LearnerModel:
    """One rank's part of the model and what belongs to it."""

    architecture: Architecture
    layout: Layout
    config: TransformerConfig
    chunks: tuple[DistributedDataParallel, ...]
    """Of this pipeline stage: several where stages are interleaved, the last stage's last one has the output"""
    optimizer: MegatronOptimizer
    weights: WeightMap
    device: torch.device
    dense_attention: bool
    """Whether attention takes an ``AttentionPlan``"""
    keep_logits: bool
    """Whether training keeps logits from the forward to the backward pass"""

    @property
    def output_weight(self) -> Tensor:
        """[V / tp, h], of the last pipeline stage."""
        weight: Tensor = self.chunks[-1].module.output_matrix()
        return weight

    @property
    def value_head(self) -> torch.nn.Module:
        """The critic's, of the last pipeline stage."""
        head: torch.nn.Module = self.chunks[-1].module.value_head
        return head

    @property
    def rotary_frequencies(self) -> Tensor:
        """[dim / 2], radians per position"""
        frequencies: Tensor = self.chunks[0].module.rotary_pos_emb.inv_freq
        return frequencies

    def parameters(self) -> list[torch.nn.Parameter]:
        """Of all chunks, in order."""
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    @property
    def alignment(self) -> int:
        """Lengths of packed sequences must divide by this: 2 · cp, or 1."""
        return 2 * self.layout.context if self.layout.context > 1 else 1


def build_model(
    config: Config, checkpoint: Path, on_progress: Progress = silent, *, random_weights: bool = False
) -> LearnerModel:
    """Raises ``ValueError`` for options, layouts and checkpoints that cannot work, before any group is formed.

    With ``random_weights`` the checkpoint needs only its config.json: weights stay as Megatron initialises them.
    """
    architecture = Architecture.read(checkpoint)
    options = parse_options(config.megatron, world_size_from_environment())
    check_layout(options.layout, architecture, config.megatron)
    if config.learner.recompute_elementwise:
        options = with_recomputed_norms(options)
    compat.install()
    device = initialize(options.layout, config.run.seed)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    model_config = transformer_config(architecture, options, dtype)
    recompute = config.learner.recompute_elementwise
    modules = build_chunks(architecture, model_config, options.layout, recompute_elementwise=recompute)
    for module in modules:
        replay_in(module)
    if config.has_critic and modules[-1].post_process:
        modules[-1].value_head = ValueHead(model_config, train_trunk=config.critic.train_trunk).to(device)
    weights = WeightMap(architecture, options.layout, modules)
    if not random_weights:
        weights.load(checkpoint, on_progress)
    chunks, optimizer = _ddp_and_optimizer(config, model_config, modules, options, dtype)
    return LearnerModel(
        architecture=architecture,
        layout=options.layout,
        config=model_config,
        chunks=chunks,
        optimizer=optimizer,
        weights=weights,
        device=device,
        dense_attention=not (has_transformer_engine() or has_varlen_kernel(dtype, options.layout.context)),
        keep_logits=config.learner.keep_logits,
    )


def transformer_config(model: Architecture, options: MegatronOptions, dtype: torch.dtype) -> TransformerConfig:
    """What the checkpoint and our way of training say, and then the user's own fields."""
    fused = torch.cuda.is_available()
    fields: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.heads,
        "num_query_groups": model.groups,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "layernorm_epsilon": model.norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": False,  # without bias and dropout an addition is left
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": weight_gradients.available(),
        "use_cpu_initialization": not torch.cuda.is_available(),
        "variable_seq_lengths": True,  # packed batches differ in length, and pipeline stages must learn of it
        "moe_token_dispatcher_type": "alltoall",  # the only one that takes variable lengths
        "calculate_per_token_loss": True,  # the loss is over global denominators already: DDP only adds up
    }
    if model.experts is not None:
        fields |= {
            "num_moe_experts": model.experts.count,
            "moe_router_topk": model.experts.per_token,
            "moe_ffn_hidden_size": model.experts.hidden_size,
            "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not model.experts.normalized,
            "moe_router_dtype": "fp32",
        }
    return TransformerConfig(**fields | options.model)


def _ddp_and_optimizer(
    config: Config,
    model_config: TransformerConfig,
    modules: list[PackedGPT],
    options: MegatronOptions,
    dtype: torch.dtype,
) -> tuple[tuple[DistributedDataParallel, ...], MegatronOptimizer]:
    ddp_config = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True} | options.ddp)
    chunks = tuple(
        # buckets are for overlap with the backward pass, which ends with the first chunk
        DistributedDataParallel(config=model_config, ddp_config=ddp_config, module=module, disable_bucketing=i > 0)
        for i, module in enumerate(modules)
    )
    learner = config.learner
    ours = {
        "lr": learner.learning_rate,
        "weight_decay": learner.weight_decay,
        "adam_beta1": learner.adam_beta1,
        "adam_beta2": learner.adam_beta2,
        "adam_eps": learner.adam_eps,
        "clip_grad": learner.clip_grad or math.inf,  # at 0 Megatron would not even compute the norm
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
    }
    with compat.types_named_as_on_cuda(p for chunk in chunks for p in chunk.parameters()):
        optimizer = get_megatron_optimizer(OptimizerConfig(**ours | options.optimizer), list(chunks))
    compat.fuse_adam(optimizer)
    model_config.grad_scale_func = optimizer.scale_loss
    model_config.finalize_model_grads_func = _add_up_gradients
    if ddp_config.overlap_grad_reduce:
        no_syncs = [chunk.no_sync for chunk in chunks]
        model_config.no_sync_func = no_syncs if len(chunks) > 1 else no_syncs[0]
    return chunks, optimizer


def _add_up_gradients(model: list[Any], _num_tokens: torch.Tensor | None = None, **groups: Any) -> None:
    """Megatron's reduction without its division by a token count."""
    finalize_model_grads(model, None, **groups)
