"""Fields of Megatron's configs that ``[megatron]`` may not set, and where they come from instead."""

from __future__ import annotations

_BY_REASON: dict[str, tuple[str, ...]] = {
    "it follows from the checkpoint's config.json": (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "layernorm_epsilon",
        "normalization",
        "gated_linear_unit",
        "activation_func",
        "add_bias_linear",
        "add_qkv_bias",
        "qk_layernorm",
        "num_moe_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_router_pre_softmax",
        "moe_router_score_function",
        "moe_layer_freq",
        "multi_latent_attention",
        "rotary_interleaved",
    ),
    "the learner sets it": (
        "calculate_per_token_loss",
        "variable_seq_lengths",
        "use_cpu_initialization",
        "perform_initialization",
        "timers",
        "finalize_model_grads_func",
        "grad_scale_func",
        "no_sync_func",
        "grad_sync_func",
        "param_sync_func",
    ),
    "set model.dtype": ("params_dtype", "bf16", "fp16", "pipeline_dtype"),
    "set learner.learning_rate": ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr"),
    "set the field of that name in [learner]": ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad"),
    "dropout would make importance ratios random": ("hidden_dropout", "attention_dropout"),
    "the learner does not support it": (
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "use_megatron_fsdp",
        "use_custom_fsdp",
        "mtp_num_layers",
        "heterogeneous_block_specs",
        "average_in_collective",
        "overlap_param_gather",
        "align_param_gather",
        "overlap_param_gather_with_optimizer_step",
        "moe_expert_capacity_factor",
        "hybrid_context_parallel",
    ),
}

RESERVED: dict[str, str] = {name: reason for reason, names in _BY_REASON.items() for name in names}
"""Field → why it cannot be set"""
