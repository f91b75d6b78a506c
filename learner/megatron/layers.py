"""Layer specifications: TransformerEngine's where it is installed, else megatron-core's own modules with torch's
RMSNorm and ``TorchAttention``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, cast

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from slime_async.learner.megatron.attention import PackedSelfAttention, TorchAttention
from slime_async.learner.megatron.fused import swiglu


def has_transformer_engine() -> bool:
    """TransformerEngine computes on CUDA devices only."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor.

    Under sequence parallelism each tensor-parallel rank sees a part of the tokens; the flag on the weight makes
    Megatron add up its gradient over these ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        device = "cuda" if torch.cuda.is_available() and not config.use_cpu_initialization else "cpu"
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ValueHead(torch.nn.Module):
    """A critic's: one number per hidden state, 0 before it is trained."""

    def __init__(self, config: TransformerConfig, *, train_trunk: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._train_trunk = train_trunk

    def forward(self, hidden: Tensor) -> Tensor:
        """[P / sp, 1, h] → [P / sp] in fp32"""
        hidden = hidden if self._train_trunk else hidden.detach()
        return (hidden[:, 0].float() * self.weight.float()).sum(-1)


class SwiGLU(MLP):  # type: ignore[misc]
    """Megatron's dense MLP with the fused activation."""

    recomputes: ClassVar = False
    """Whether the backward pass computes the activation again, from what the first product gave"""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor | None]:
        gate_up, _bias = self.linear_fc1(hidden_states)
        inner = swiglu(gate_up)
        with kept_as(inner, partial(swiglu, gate_up.detach())) if self.recomputes else nullcontext():
            return cast("tuple[Tensor, Tensor | None]", self.linear_fc2(inner))


class RecomputedSwiGLU(SwiGLU):
    recomputes: ClassVar = True


@contextmanager
def kept_as(tensor: Tensor, recompute: Callable[[], Tensor]) -> Iterator[None]:
    """What is computed inside remembers ``recompute`` for its backward pass, and not ``tensor``."""
    address, shape = tensor.data_ptr(), tensor.shape

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        return recompute if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def block_spec(
    config: TransformerConfig, virtual_stage: int | None, *, recompute_elementwise: bool
) -> TransformerBlockSubmodules | ModuleSpec:
    """What this (virtual) pipeline stage's decoder is made of."""
    if has_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    layer = torch_layer_spec(config, RecomputedSwiGLU if recompute_elementwise else SwiGLU)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, virtual_stage), layer_norm=RMSNorm
    )


def torch_layer_spec(config: TransformerConfig, dense: type[SwiGLU]) -> ModuleSpec:
    """One pre-norm decoder layer, with a dense MLP or a mixture of experts, in megatron-core and torch modules."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=TorchAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=dense if config.num_moe_experts is None else _experts_spec(),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _experts_spec() -> ModuleSpec:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = ModuleSpec(module=SequentialMLP, submodules=linears)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
