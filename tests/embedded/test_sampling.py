"""Sampling: the right distribution, the right support, and nothing of a row in another row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from slime_async.actors.embedded.sampling import sample, uniforms

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0, 0.0])


def draw(
    logits: Tensor, n: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """n tokens of one distribution, one per position of a seed."""
    uniform = uniforms(np.full(n, seed, dtype=np.uint64), np.arange(n))
    return sample(
        logits.expand(n, -1),
        torch.from_numpy(uniform),
        torch.full((n,), temperature),
        torch.full((n,), top_p),
        torch.full((n,), top_k),
    )


def excess(tokens: Tensor, probs: Tensor) -> float:
    """Pearson's χ² over its degrees of freedom: 1 on average when ``tokens`` follow ``probs``."""
    support = probs > 0
    expected = probs[support].double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert counts[~support].sum() == 0, "a token of probability 0 was sampled"
    return float(((counts[support] - expected) ** 2 / expected).sum() / (int(support.sum()) - 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_distribution_at_the_temperature(temperature: float, seed: int) -> None:
    tokens, _ = draw(LOGITS, 20_000, temperature, seed=seed)
    assert excess(tokens, (LOGITS / temperature).softmax(-1)) < 4  # 5 degrees of freedom: once in 1000


@pytest.mark.parametrize(
    ("top_p", "top_k", "support"),
    [
        (1.0, -1, [0, 1, 2, 3, 4, 5]),
        (1.0, 0, [0, 1, 2, 3, 4, 5]),
        (1.0, 1, [0]),
        (1.0, 3, [0, 1, 2]),
        (1.0, 99, [0, 1, 2, 3, 4, 5]),
        (0.01, -1, [0]),
        (0.5, -1, [0]),  # token 0 alone has 0.56
        (0.6, -1, [0, 1]),
        (0.8, -1, [0, 1, 2]),  # 0.56 + 0.21 + 0.13
        (0.8, 2, [0, 1]),  # of the two that are left, 0.73 and 0.27
        (0.7, 2, [0]),
    ],
)
def test_truncation_keeps_exactly_the_most_probable_tokens(top_p: float, top_k: int, support: list[int]) -> None:
    tokens, _ = draw(LOGITS, 20_000, top_p=top_p, top_k=top_k)
    kept = torch.zeros(6)
    kept[support] = LOGITS.softmax(-1)[support]
    assert sorted(tokens.unique().tolist()) == support
    if len(support) > 1:
        assert excess(tokens, kept / kept.sum()) < 4


def test_logprobs_are_after_temperature_and_before_truncation() -> None:
    tokens, logprobs = draw(LOGITS, 500, temperature=0.7, top_p=0.9, top_k=3)
    torch.testing.assert_close(logprobs, (LOGITS / 0.7).log_softmax(-1)[tokens])


def test_greedy_takes_the_maximum_and_reports_it_at_temperature_one() -> None:
    tokens, logprobs = draw(LOGITS, 50, temperature=0.0)
    assert tokens.tolist() == [0] * 50
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[:1].expand(50))


def test_every_row_is_sampled_by_its_own_parameters_whatever_the_order() -> None:
    rows = 64
    logits = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    uniform = torch.from_numpy(uniforms(np.arange(rows, dtype=np.uint64), np.arange(rows)))
    temperature = torch.from_numpy(rng.choice([0.0, 0.6, 1.0, 1.5], rows).astype(np.float32))
    top_p = torch.from_numpy(rng.choice([0.5, 0.9, 1.0], rows).astype(np.float32))
    top_k = torch.from_numpy(rng.choice([-1, 1, 5], rows))
    columns = (logits, uniform, temperature, top_p, top_k)
    tokens, logprobs = sample(*columns)

    order = torch.from_numpy(rng.permutation(rows))
    shuffled, shuffled_logprobs = sample(*(column[order] for column in columns))
    assert torch.equal(shuffled, tokens[order])
    assert torch.equal(shuffled_logprobs, logprobs[order])
    for i in range(rows):
        assert sample(*(column[i : i + 1] for column in columns))[0].item() == tokens[i].item()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    ones = torch.ones(1)
    token, logprob = sample(logits, torch.tensor([uniform], dtype=torch.float64), ones, ones, -ones.long())
    assert token.item() == (1 if uniform == 0 else 2)
    assert logprob.isfinite()


def test_a_large_vocabulary_keeps_its_tail() -> None:
    """151,936 equal tokens: each has 7e-6, below what an fp32 running sum near 1 tells apart exactly."""
    vocab = 151_936
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.999, 1 - 2.0**-53], dtype=torch.float64)
    ones = torch.ones(5)
    tokens, _ = sample(torch.zeros(5, vocab), uniform, ones, ones, -ones.long())
    assert tokens.tolist() == [int(u * vocab) for u in uniform.tolist()]


def test_a_row_without_truncation_keeps_its_tail_beside_a_truncated_one() -> None:
    logits = torch.tensor([[20.0, 0.0, 0.0]]).expand(2, -1)  # the tail is below what an fp32 sum near 1 can hold
    uniform, ones = torch.full((2,), 1 - 2.0**-53, dtype=torch.float64), torch.ones(2)
    tokens, _ = sample(logits, uniform, ones, torch.tensor([1.0, 0.9]), -ones.long())
    assert tokens.tolist() == [2, 0]


def test_uniforms_fill_the_half_open_unit_interval_evenly() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 500)
    values = uniforms(seeds, np.tile(np.arange(500), 200))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert len(np.unique(values)) == len(values)
    bins = torch.from_numpy((values * 50).astype(np.int64))
    assert excess(bins, torch.full((50,), 1 / 50)) < 1.8  # 49 degrees of freedom: once in 2000
    grid = values.reshape(200, 500)
    for series in (grid, grid.T):  # along a seed, and across neighbouring seeds
        assert abs(np.corrcoef(series[:, :-1].ravel(), series[:, 1:].ravel())[0, 1]) < 0.015


def test_extreme_seeds_and_positions_are_as_good_as_any() -> None:
    seeds = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    values = np.concatenate([uniforms(seeds, np.full(4, position)) for position in (0, 1, 2**40)])
    assert len(np.unique(values)) == 12
    assert ((values >= 0) & (values < 1)).all()
