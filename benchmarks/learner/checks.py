"""Whether the fast paths compute what the plain ones do, on this device: values and gradients, each with its error.

The reference of every check is the plain path in fp32 (on CPUs fp64); an error is the largest difference over the
reference's largest value. The plain path in the device's own dtype is measured beside it: the fast one may be at most
1.5 times as far off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.learner.trainers import by_sequence
from slime_async.learner.megatron.attention import groups_queries, variable_length_attention
from slime_async.learner.megatron.fused import norm_and_rotate, swiglu
from slime_async.learner.megatron.logprob import token_logprobs
from slime_async.learner.megatron.weight_gradients import WeightGradients

SLACK, FLOOR = 1.5, 1e-5
LENGTHS = (513, 1, 300, 1024, 200, 10)
"""Of the packed sequences of a check on a GPU"""
SHORT_LENGTHS = (33, 1, 20, 10)

Compute = Callable[..., Sequence[Tensor]]


class OneRank:
    """A process group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Check:
    """Errors against fp32, of values and of gradients together."""

    name: str
    error: float
    plain_error: float

    @property
    def passed(self) -> bool:
        return self.error <= SLACK * self.plain_error + FLOOR

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"passed": self.passed}


def run_checks(device: torch.device, dtype: torch.dtype) -> list[Check]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    checks = [_attention(random, device, heads, groups) for heads, groups in ((8, 8), (8, 2))]
    checks += [_norm_and_rotate(random, device), _swiglu(random), _weight_gradient(random)]
    checks += [_logprobs(random, device, keep) for keep in (False, True)]
    return checks


def _compare(name: str, fast: Compute, plain: Compute, inputs: Sequence[Tensor]) -> Check:
    exact = _with_gradients(plain, [x.double() if x.device.type == "cpu" else x.float() for x in inputs])
    errors = [_error(_with_gradients(way, inputs), exact) for way in (fast, plain)]
    return Check(name, *errors)


def _with_gradients(compute: Compute, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = list(compute(*leaves))
    weighted = [(o.float() * torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o)).sum() for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(sum(weighted[1:], weighted[0]), leaves))


def _error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(values, exact, strict=True)
    return max(float((v.double() - e.double()).abs().max() / e.double().abs().max()) for v, e in pairs)


def _attention(random: Callable[..., Tensor], device: torch.device, heads: int, groups: int) -> Check:
    lengths = LENGTHS if device.type == "cuda" else SHORT_LENGTHS
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    scale = 128**-0.5

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        if not q.is_cuda:
            return plain(q, k, v)
        if not groups_queries():
            k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        return [variable_length_attention(q, k, v, ends, max(lengths), scale)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        return [by_sequence(q, k, v, ends, scale)]

    total = sum(lengths)
    inputs = [random(total, n, 128) for n in (heads, groups, groups)]
    return _compare(f"varlen attention, {heads} heads on {groups}", fast, plain, inputs)


def _norm_and_rotate(random: Callable[..., Tensor], device: torch.device) -> Check:
    tokens = 2048 if device.type == "cuda" else 64
    angles = torch.arange(tokens, device=device)[:, None] * 1e6 ** -(torch.arange(64, device=device) / 64)
    cos, sin = angles.cos(), angles.sin()
    fused = norm_and_rotate
    plain: Callable[..., Sequence[Tensor]] = norm_and_rotate.__wrapped__  # type: ignore[attr-defined]
    inputs = [random(tokens, 2, 4, 128), random(tokens, 2, 1, 128), random(128).abs(), random(128).abs()]
    return _compare(
        "norm and RoPE of heads",
        lambda *x: fused(*x, cos, sin, 1e-6),
        lambda *x: plain(*x, cos, sin, 1e-6),
        inputs,
    )


def _swiglu(random: Callable[..., Tensor]) -> Check:
    def plain(x: Tensor) -> Sequence[Tensor]:
        gate, up = x.chunk(2, -1)
        return [F.silu(gate) * up]

    return _compare("SwiGLU", lambda x: [swiglu(x)], plain, [random(256, 1, 1024)])


def _weight_gradient(random: Callable[..., Tensor]) -> Check:
    """Of two microbatches, in a buffer that takes their sum."""
    inputs, grads = random(2, 1024, 256), random(2, 1024, 512)
    exact = sum(g.double().t() @ x.double() for x, g in zip(inputs, grads, strict=True))
    fused, plain = (torch.zeros(512, 256, device=inputs.device) for _ in range(2))
    for x, grad in zip(inputs, grads, strict=True):
        WeightGradients.wgrad_gemm_accum_fp32(x, grad, fused)
        plain += grad.t() @ x
    return Check("weight gradients in fp32", _error([fused], [exact]), _error([plain], [exact]))


def _logprobs(random: Callable[..., Tensor], device: torch.device, keep_logits: bool) -> Check:
    vocabulary, tokens = (20_000, 2048) if device.type == "cuda" else (1000, 256)
    targets = (torch.arange(tokens, device=device) * 7919) % vocabulary

    def fast(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        logprobs, entropy = token_logprobs(
            hidden,
            weight,
            targets,
            temperature=0.8,
            vocab_size=vocabulary,
            group=OneRank(),  # type: ignore[arg-type]
            entropy=True,
            keep_logits=keep_logits,
        )
        assert entropy is not None
        return [logprobs, entropy]

    def plain(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        logits = hidden @ weight.t()
        log_p = ((logits if logits.dtype == torch.double else logits.float()) / 0.8).log_softmax(-1)
        return [log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)]

    inputs = [random(tokens, 256), random(vocabulary, 256, scale=0.1)]
    return _compare(f"log-probs and entropy in chunks{', logits kept' * keep_logits}", fast, plain, inputs)
