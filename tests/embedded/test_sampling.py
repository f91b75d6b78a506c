"""Sampling: the right distribution, the right support, nothing but (logits, seed, position)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from slime_async.actors.embedded.sampling import sample, uniforms

DRAWS = 20_000


def draw(
    logits: Tensor, draws: int = DRAWS, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1, seed: int = 5
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of ``draws`` positions of one seed's stream, all from ``logits`` [V]."""
    uniform = uniforms(np.full(draws, seed, np.uint64), np.arange(draws))
    return sample(
        logits.expand(draws, -1),
        torch.from_numpy(uniform),
        torch.full((draws,), temperature),
        torch.full((draws,), top_p),
        torch.full((draws,), top_k, dtype=torch.int64),
    )


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * len(tokens)
    observed = torch.bincount(tokens, minlength=len(probabilities))
    return float(((observed - expected) ** 2 / expected).sum())


LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5, 0.3, 1.4])
CHI_SQUARE_7_999 = 24.3
"""The 99.9th percentile for 7 degrees of freedom"""


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    tokens, logprobs = draw(LOGITS, temperature=temperature)
    expected = (LOGITS / temperature).softmax(-1)
    assert chi_square(tokens, expected) < CHI_SQUARE_7_999
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_uniforms_of_neighbouring_seeds_and_positions_are_uniform_and_uncorrelated() -> None:
    bins = 16
    for seeds, positions in [
        (np.arange(DRAWS, dtype=np.uint64), np.zeros(DRAWS, np.int64)),
        (np.zeros(DRAWS, np.uint64), np.arange(DRAWS)),
    ]:
        drawn = uniforms(seeds, positions)
        assert ((drawn >= 0) & (drawn < 1)).all()
        assert chi_square(torch.from_numpy((drawn * bins).astype(np.int64)), torch.full((bins,), 1 / bins)) < 37.7
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / np.sqrt(DRAWS)


def test_top_k_samples_among_the_k_most_probable_and_reports_the_whole_softmax() -> None:
    tokens, logprobs = draw(LOGITS, top_k=3)
    assert set(tokens.tolist()) == {2, 7, 4}
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[tokens])


def test_top_p_samples_among_the_fewest_tokens_that_reach_the_mass() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    for top_p, support in [(0.35, {1}), (0.6, {1, 3}), (0.8, {1, 3, 2}), (1.0, {0, 1, 2, 3, 4})]:
        tokens, logprobs = draw(probabilities.log(), top_p=top_p)
        assert set(tokens.tolist()) == support
        torch.testing.assert_close(logprobs, probabilities.log()[tokens])


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    tokens, _ = draw(probabilities.log(), top_k=2, top_p=0.5)  # of 0.4 : 0.3, the first is 57 %
    assert set(tokens.tolist()) == {0}


def test_greedy_takes_the_largest_logit_and_reports_temperature_one() -> None:
    tokens, logprobs = draw(LOGITS, 10, temperature=0.0)
    assert set(tokens.tolist()) == {2}
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[tokens])


def test_a_token_without_probability_is_never_sampled() -> None:
    logits = torch.full((1000,), -torch.inf)
    logits[[3, 998]] = 0.0
    for uniform in (0.0, np.nextafter(0.5, 0), 0.5, np.nextafter(1.0, 0)):
        token, _ = sample(
            logits[None], torch.tensor([uniform]), torch.ones(1), torch.ones(1), torch.tensor([-1], dtype=torch.int64)
        )
        assert token.item() == (3 if uniform < 0.5 else 998)


def test_rows_of_different_kinds_do_not_disturb_each_other() -> None:
    kinds = [(1.0, 1.0, -1), (0.0, 1.0, -1), (0.7, 0.6, -1), (1.3, 1.0, 2)]
    uniform = uniforms(np.arange(4, dtype=np.uint64), np.zeros(4, np.int64))
    logits = torch.stack([LOGITS.roll(i) for i in range(4)])
    columns = [torch.tensor(column) for column in zip(*kinds, strict=True)]
    together = sample(logits, torch.from_numpy(uniform), *columns)
    for i in range(4):
        alone = sample(logits[i : i + 1], torch.from_numpy(uniform[i : i + 1]), *(c[i : i + 1] for c in columns))
        assert together[0][i] == alone[0][0]
        assert together[1][i] == alone[1][0]
