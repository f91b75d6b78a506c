"""Log-probability and entropy of tokens whose vocabulary is split over tensor-parallel ranks.

With z the logits of a token, Z = Σ exp z: ``log p(y) = z_y − log Z`` and ``H = log Z − Σ p z``. Tokens are taken in
chunks, so that no fp32 copy of all logits ever exists: the forward pass keeps the logits as they came and two numbers
per token; the backward pass recomputes each chunk's softmax and writes the gradient in the logits' own dtype. Between
ranks travel three numbers per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 25
"""Logits per chunk: 128 MiB in fp32"""


def token_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float, vocab_size: int, group: dist.ProcessGroup, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """[T] fp32 log-probabilities of ``targets`` [T] after temperature, and the entropies [T] if asked for.

    ``logits`` [T, V/tp] are this rank's columns; columns at and beyond ``vocab_size`` pad the vocabulary and get no
    probability.
    """
    logprobs, entropies = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        logits, targets, 1.0 / temperature, vocab_size, group, entropy
    )
    return logprobs, (entropies if entropy else None)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, scale: float, vocab_size: int, group: Any, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        first = group.rank() * logits.size(1)
        real = min(max(vocab_size - first, 0), logits.size(1))
        column = targets - first
        mine = (column >= 0) & (column < logits.size(1))
        column = column.clamp(0, logits.size(1) - 1)
        log_z = torch.empty(logits.size(0), dtype=torch.float32, device=logits.device)
        chosen, mean = torch.empty_like(log_z), torch.zeros_like(log_z)
        for rows in _chunks(logits):
            z = _scaled(logits[rows], scale, real)
            top = z.amax(1)
            if group.size() > 1:
                dist.all_reduce(top, dist.ReduceOp.MAX, group)
            at_target = z.gather(1, column[rows, None])[:, 0]
            exp = (z - top[:, None]).exp_()
            weighted = (exp * z.masked_fill(exp == 0, 0.0)).sum(1) if entropy else torch.zeros_like(top)
            sums = torch.stack([exp.sum(1), torch.where(mine[rows], at_target, 0.0), weighted])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            log_z[rows] = sums[0].log() + top
            chosen[rows] = sums[1]
            mean[rows] = sums[2] / sums[0]
        ctx.save_for_backward(logits, column, mine, log_z, mean)
        ctx.scale, ctx.real = scale, real
        ctx.set_materialize_grads(False)  # no gradient of the entropy is the common case, and costs nothing then
        return chosen - log_z, log_z - mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, column, mine, log_z, mean = ctx.saved_tensors
        grad_logprob, grad_entropy = grads
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(log_z)
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            z = _scaled(logits[rows], ctx.scale, ctx.real)
            p = (z - log_z[rows, None]).exp_()
            slope = -grad_logprob[rows, None]
            if grad_entropy is not None:  # dH/dz = −p (z − Σ p z)
                slope = slope - grad_entropy[rows, None] * (z.masked_fill(p == 0, 0.0) - mean[rows, None])
            p *= slope
            p.scatter_add_(1, column[rows, None], torch.where(mine[rows], grad_logprob[rows], 0.0)[:, None])
            grad[rows] = p if ctx.scale == 1.0 else p * ctx.scale
        return grad, None, None, None, None, None


def _scaled(logits: Tensor, scale: float, real: int) -> Tensor:
    """fp32 logits after temperature, −∞ in padded columns."""
    z = logits.float()
    if scale != 1.0:
        z = z * scale
    if real < z.size(1):
        z = z.clone() if z.data_ptr() == logits.data_ptr() else z
        z[:, real:] = -torch.inf
    return z


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // logits.size(1))
    return [slice(i, i + size) for i in range(0, logits.size(0), size)]
