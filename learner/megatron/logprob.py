"""Log-probability and entropy of tokens straight from hidden states, without the logits of a whole microbatch.

With z = h Wᵀ the logits of a token and Z = Σ exp z: ``log p(y) = z_y − log Z`` and ``H = log Z − Σ p z``. Tokens are
taken in chunks: the forward pass keeps two numbers per token, the backward pass computes each chunk's logits again and
turns them into gradients of hidden states and weights. No fp32 copy of logits ever exists, and of the half-precision
ones only a chunk. W's rows may be split over tensor-parallel ranks, between which four numbers per token travel.

Memory for T tokens, vocabulary V and hidden size h, 2-byte weights, beside the gradient of W itself:

====================  ===================================  ==========================
way                   bytes                                T = 8,192, V = 151,936
====================  ===================================  ==========================
plain                 2·T·V, and 4·T·V at least twice      12.4 GB
here                  2·chunk (``CHUNK_BYTES``)            2.1 GB
here, logits kept     2·T·V and a chunk                    3.6 GB
====================  ===================================  ==========================
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime_async.learner.megatron.fused import logit_gradient, logit_statistics
from slime_async.learner.megatron.weight_gradients import WeightGradients, sums_products

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Of one chunk's logits: enough rows that a GPU's matrix product runs at its full rate"""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    entropy: bool,
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[T] fp32 log-probabilities of ``targets`` [T] after temperature, and the entropies [T] if asked for.

    ``hidden`` is [T, h] and ``weight`` [V/tp, h] this rank's rows; rows at and beyond ``vocab_size`` pad the vocabulary
    and get no probability. The gradient of ``hidden`` is this rank's part: the caller adds up over ``group``.
    ``keep_logits`` saves the second computation of the logits at the price of their memory.
    """
    logprobs, entropies = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, 1.0 / temperature, vocab_size, group, keep_logits
    )
    return logprobs, (entropies if entropy else None)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        vocab_size: int,
        group: dist.ProcessGroup,
        keep_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        first, columns = group.rank() * weight.size(0), weight.size(0)
        real = min(max(vocab_size - first, 0), columns)
        column = targets - first
        column = torch.where((column >= 0) & (column < columns), column, -1)
        parts, kept = [], []
        for rows in _chunks(hidden, columns):
            logits = hidden[rows] @ weight.t()
            parts.append(torch.stack(logit_statistics(logits, column[rows], scale, real)))
            if keep_logits:
                kept.append(logits)
        log_z, mean, at_target = _joined(torch.cat(parts, 1), group)
        ctx.save_for_backward(hidden, weight, column, log_z, mean)
        ctx.scale, ctx.real, ctx.kept = scale, real, kept
        ctx.set_materialize_grads(False)  # no gradient of the entropy is the common case, and costs nothing then
        return at_target - log_z, log_z - mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, column, log_z, mean = ctx.saved_tensors
        grad_logprob, grad_entropy = grads
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(log_z)
        grad_hidden = torch.empty_like(hidden)
        total, grad_weight = _weight_gradient_buffer(weight)
        for i, rows in enumerate(_chunks(hidden, weight.size(0))):
            logits = ctx.kept[i] if ctx.kept else hidden[rows] @ weight.t()
            slope = None if grad_entropy is None else grad_entropy[rows]
            grad = logit_gradient(
                logits, column[rows], log_z[rows], mean[rows], grad_logprob[rows], slope, ctx.scale, ctx.real
            )
            del logits
            if ctx.kept:
                ctx.kept[i] = None
            torch.mm(grad, weight, out=grad_hidden[rows])
            if sums_products(grad, total):
                WeightGradients.wgrad_gemm_accum_fp32(hidden[rows], grad, total)
            else:
                total += grad.t() @ hidden[rows]
        grad_weight = total.to(weight.dtype) if grad_weight is None else grad_weight
        return grad_hidden, grad_weight, None, None, None, None, None


def _weight_gradient_buffer(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the chunks' products are summed, in fp32: Megatron's own buffer where it has one for these weights.

    Autograd then gets zeros, so that Megatron's hooks hear of the weights all the same.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None and main_grad.dtype is torch.float32:
        return main_grad, weight.new_zeros(()).expand_as(weight)
    return torch.zeros_like(weight, dtype=torch.float32), None


def _joined(statistics: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """[4, T] of this rank's columns → log Z, Σ p z and the target's logit over all columns."""
    top, total, weighted, at_target = statistics.unbind()
    if group.size() > 1:
        highest = top.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        shift = (top - highest).exp()
        sums = torch.stack([total * shift, weighted * shift, at_target])
        dist.all_reduce(sums, group=group)
        top, (total, weighted, at_target) = highest, sums.unbind()
    return total.log() + top, weighted / total, at_target


def _chunks(hidden: Tensor, columns: int) -> list[slice]:
    """Slices of a power of two rows, as many as have logits of ``CHUNK_BYTES`` at most."""
    tokens = hidden.size(0)
    most = max(1, CHUNK_BYTES[hidden.device.type] // (columns * hidden.element_size()))
    size = 1 << (most.bit_length() - 1)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]
