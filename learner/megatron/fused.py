"""Elementwise work between matrix products, each function one or two GPU kernels by torch.compile.

Without Triton (on CPUs, or with ``TORCH_COMPILE_DISABLE=1``) the same functions run as they stand. All compute in fp32
and round once, at the end.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


@cache
def compiles() -> bool:
    """Whether kernels are compiled: needs a CUDA device and Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def fused(*per_token: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Compile a function at its first call, where that can be; the function itself stays at ``__wrapped__``.

    ``per_token`` names the arguments with one row per token: their number may change without another compilation.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        positions = [i for i, name in enumerate(signature(function).parameters) if name in per_token]
        assert len(positions) == len(per_token)
        compiled: list[Callable[_P, _R]] = []

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not compiles():
                return function(*args, **kwargs)
            if not compiled:
                compiled.append(torch.compile(function))
            for i in positions:
                if isinstance(tensor := args[i], Tensor):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return compiled[0](*args, **kwargs)

        return call

    return decorate


@fused("query", "key", "cos", "sin")
def norm_and_rotate(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over each head (none where there is no weight), then RoPE: the heads' halves turned by cos and sin.

    ``query`` [T, groups, heads per group, dim] and ``key`` [T, groups, 1, dim], of any strides; ``cos`` and ``sin``
    [T, dim / 2] in fp32 → [T, heads, dim] and [T, groups, dim], contiguous.
    """
    return _norm_and_rotate(query, query_weight, cos, sin, eps), _norm_and_rotate(key, key_weight, cos, sin, eps)


def _norm_and_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    y = x.float()
    if weight is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    first, second = y.chunk(2, -1)
    c, s = cos[:, None, None], sin[:, None, None]
    turned = torch.cat([first * c - second * s, second * c + first * s], -1)
    return turned.to(x.dtype).flatten(1, 2)


@fused("gate_up")
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [..., 2 · inner]"""
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


class LogitStatistics(NamedTuple):
    """Per token over this rank's columns of the vocabulary, fp32 [T]; z are the logits after temperature."""

    top: Tensor
    """max z"""
    total: Tensor
    """Σ exp(z − top)"""
    weighted: Tensor
    """Σ z · exp(z − top)"""
    at_target: Tensor
    """z of the target, 0 where it is not among these columns"""


@fused("logits", "column")
def logit_statistics(logits: Tensor, column: Tensor, scale: float, real: int) -> LogitStatistics:
    """``logits`` [T, V]; ``column`` [T] is the target's, or −1 where another rank has it; columns from ``real`` on pad
    the vocabulary and have no probability."""
    z = _scaled(logits, scale, real)
    top = z.amax(1).clamp_min(torch.finfo(torch.float32).min)  # all −∞ where a rank has padding alone
    exp = (z - top[:, None]).exp()
    weighted = torch.where(exp == 0, 0.0, exp * z).sum(1)
    at_target = torch.where(column < 0, 0.0, z.gather(1, column.clamp_min(0)[:, None])[:, 0])
    return LogitStatistics(top, exp.sum(1), weighted, at_target)


@fused("logits", "column", "log_z", "mean", "grad_logprob", "grad_entropy")
def logit_gradient(
    logits: Tensor,
    column: Tensor,
    log_z: Tensor,
    mean: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    scale: float,
    real: int,
) -> Tensor:
    """d(log p, H)/d logits, in the logits' dtype. With p = exp(z − log Z): dlog p(y)/dz = 1[y] − p, and
    dH/dz = −p (z − Σ p z)."""
    z = _scaled(logits, scale, real)
    p = (z - log_z[:, None]).exp()
    slope = -grad_logprob[:, None]
    if grad_entropy is not None:
        slope = slope - grad_entropy[:, None] * (torch.where(p == 0, 0.0, z) - mean[:, None])
    is_target = torch.arange(logits.size(1), device=logits.device) == column[:, None]
    grad = p * slope + torch.where(is_target, grad_logprob[:, None], 0.0)
    return (grad * scale).to(logits.dtype)


def _scaled(logits: Tensor, scale: float, real: int) -> Tensor:
    z = logits.float() * scale
    if real < logits.size(1):
        z = torch.where(torch.arange(logits.size(1), device=logits.device) < real, z, -torch.inf)
    return z
