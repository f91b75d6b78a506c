"""Parts of the Megatron backend alone: version, log-probs in chunks, attention plans."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from slime_async.learner.megatron import compat, logprob
from slime_async.learner.megatron.attention import local_positions, plan_attention
from slime_async.learner.megatron.fused import norm_and_rotate
from slime_async.learner.megatron.logprob import token_logprobs


class OneRank:
    """A process group of one, for code that asks for rank and size."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def test_megatron_core_is_the_release_whose_internals_are_patched() -> None:
    assert version("megatron-core") == compat.SUPPORTED_VERSION


def test_torch_stays_itself_for_everybody_else() -> None:
    compat.install()
    from megatron.core.transformer import attention

    assert attention.torch.cuda.current_device() == torch.device("cpu")
    assert attention.torch.empty(1, device="cuda").device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        torch.cuda.current_device()


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_in_chunks_equal_log_softmax(
    padding: int, temperature: float, keep_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprob.CHUNK_BYTES, "cpu", 4 * 60)
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 5), torch.randn(17 + padding, 5)
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    theirs = [x.clone().requires_grad_() for x in (hidden, weight)]
    targets = torch.randint(0, 17, (11,))
    logprobs, entropy = token_logprobs(
        *ours,
        targets,
        temperature=temperature,
        vocab_size=17,
        group=OneRank(),  # type: ignore[arg-type]
        entropy=True,
        keep_logits=keep_logits,
    )
    assert entropy is not None
    log_p = ((theirs[0] @ theirs[1].t())[:, :17] / temperature).log_softmax(-1)
    expected, expected_entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    assert_close(logprobs, expected)
    assert_close(entropy, expected_entropy)
    mix = torch.randn(2, 11)
    (logprobs @ mix[0] + entropy @ mix[1]).backward()
    (expected @ mix[0] + expected_entropy @ mix[1]).backward()
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert_close(ours_.grad, theirs_.grad)


def test_half_precision_gets_half_precision_gradients_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(logprob.CHUNK_BYTES, "cpu", 2 * 9)
    hidden = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(9, 8, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.arange(64) % 9
    group: dist.ProcessGroup = OneRank()  # type: ignore[assignment]
    logprobs, _ = token_logprobs(hidden, weight, targets, temperature=1.0, vocab_size=9, group=group, entropy=False)
    assert logprobs.dtype == torch.float32
    logprobs.sum().backward()
    exact = weight.detach().float().requires_grad_()
    (hidden.detach().float() @ exact.t()).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert_close(weight.grad.float(), exact.grad, rtol=1e-2, atol=5e-2)


def test_heads_are_normalised_and_rotated_as_transformers_does() -> None:
    torch.manual_seed(0)
    query, key, weights = torch.randn(6, 2, 3, 8), torch.randn(6, 2, 1, 8), torch.rand(2, 8)
    angles = torch.arange(6)[:, None] * (10000.0 ** -(torch.arange(4) / 4))
    ours = norm_and_rotate(query, key, weights[0], weights[1], angles.cos(), angles.sin(), 1e-6)
    cos, sin = (torch.cat([x, x], -1)[None] for x in (angles.cos(), angles.sin()))
    heads = [
        torch.nn.functional.rms_norm(x.flatten(1, 2), (8,), w, 1e-6).transpose(0, 1)[None]
        for x, w in ((query, weights[0]), (key, weights[1]))
    ]
    for mine, theirs in zip(ours, apply_rotary_pos_emb(*heads, cos, sin), strict=True):
        assert_close(mine, theirs[0].transpose(0, 1))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 3))
def test_an_attention_plan_shows_each_query_its_own_past_only(chunks: list[int], cp_size: int) -> None:
    lengths = [2 * cp_size * n for n in chunks]
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    held = [
        torch.cat([s + torch.from_numpy(local_positions(n, r, cp_size)) for s, n in zip(starts, lengths, strict=True)])
        for r in range(cp_size)
    ]
    gathered = torch.cat(held)
    for rank in range(cp_size):
        plan = plan_attention(lengths, rank, cp_size, torch.device("cpu"))
        seen: dict[int, set[int]] = {}
        row = 0
        for bucket in plan.buckets:
            queries, keys = (x.view(bucket.sequences, -1) for x in (bucket.queries, bucket.keys))
            shape = (bucket.sequences, 1, queries.size(1), keys.size(1))
            mask = torch.ones(shape, dtype=torch.bool).tril() if bucket.mask is None else bucket.mask
            for n in range(bucket.sequences):
                for q in range(queries.size(1)):
                    seen[row] = set(gathered[keys[n][mask[n, 0, q]]].tolist())
                    row += 1
        for local, token in enumerate(held[rank].tolist()):
            past = (owner == owner[token]) & (place <= place[token])
            assert seen[int(plan.restore[local])] == set(past.nonzero()[:, 0].tolist())
