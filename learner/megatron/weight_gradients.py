"""Gradients of weight matrices, added to Megatron's fp32 buffers by the matrix product itself.

Megatron-core has this through Apex's CUDA extension (``gradient_accumulation_fusion``). cuBLAS can do it as well: bf16
in, fp32 out, added to what is there; torch has it as ``addmm`` with ``out_dtype``. It saves a bf16 copy of every
weight's gradient and one more pass over the fp32 buffer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class WeightGradients:
    """In place of Apex's module ``fused_weight_gradient_mlp_cuda``."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """``main_grad`` [out, in] fp32 += ``grad_output`` [tokens, out]ᵀ · ``inputs`` [tokens, in], of one dtype."""
        if inputs.dtype is main_grad.dtype:
            main_grad.addmm_(grad_output.t(), inputs)
        else:
            torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """The same with gradients kept in the weights' own dtype."""
        main_grad.addmm_(grad_output.t(), inputs)


@functools.cache
def available() -> bool:
    """Whether torch and the GPU can do this: one tiny product tells."""
    if not torch.cuda.is_available():
        return False
    main_grad = torch.ones(16, 16, device="cuda")
    ones = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    try:
        WeightGradients.wgrad_gemm_accum_fp32(ones, ones, main_grad)
    except (TypeError, RuntimeError):  # no such overload, or not for this device
        return False
    return bool((main_grad == 17.0).all())


def sums_products(grad_output: Tensor, main_grad: Tensor) -> bool:
    """Whether a product of tensors like ``grad_output`` can be added to ``main_grad`` as it is made."""
    return grad_output.dtype is main_grad.dtype or (grad_output.is_cuda and available())


def install(layers: Any) -> None:
    """Give ``megatron.core.tensor_parallel.layers`` what it looks for at import, unless Apex has."""
    if not layers._grad_accum_fusion_available and available():
        layers.fused_weight_gradient_mlp_cuda = WeightGradients
        layers._grad_accum_fusion_available = True
