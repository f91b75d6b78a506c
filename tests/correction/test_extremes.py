"""Log-probs of −inf, ratios beyond e^20, empty masks, one token, bfloat16: finite, and as documented."""

import math

import pytest
import torch

from slime_async.config.algorithm import PRESETS, AlgorithmConfig
from slime_async.correction import Denominators, PolicyBatch, batch_statistics, policy_loss
from slime_async.correction.ratios import log_ratio, ratio

INF = math.inf
VARIANTS = [
    *({"preset": preset} for preset in PRESETS),
    *({"reject": how, "reject_statistic": "k3", "reject_upper": 1.0} for how in ("token", "sequence-mean")),
    {"reject": "sequence-max", "reject_statistic": "k2", "reject_upper": 1.0, "veto": 1e-3, "opsm_delta": 0.1},
    {"objective": "gspo-token", "dual_clip": 3.0, "prox": "interpolate"},
    {"kl_coef": 0.1, "kl_form": "k1"},
    {"kl_coef": 0.1, "kl_form": "k2"},
    {"kl_coef": 0.1, "kl_form": "k3"},
    {"kl_coef": 0.1, "kl_form": "unbiased", "entropy_coef": 0.1},
]


def run(settings, columns, mask=None, ids=None, dtype=torch.float32, fresh=1.0):
    """Loss, gradient and metrics; columns are (current, prox, behavior) per token."""
    config = AlgorithmConfig(**settings)
    current, prox, behavior = (torch.tensor(list(column), dtype=dtype) for column in zip(*columns, strict=True))
    ids = torch.zeros(len(columns), dtype=torch.long) if ids is None else torch.tensor(ids)
    mask = torch.ones(len(columns)) if mask is None else torch.tensor(mask)
    advantages = torch.tensor([1.0 if i % 2 else -1.0 for i in range(len(columns))])
    weight_mask = torch.full((len(columns),), fresh)
    batch = PolicyBatch(ids, int(ids.max()) + 1, mask, weight_mask, behavior, advantages, ids * 3, prox, behavior)
    current.requires_grad_()
    statistics = batch_statistics(config, [batch]) if config.needs_batch_statistics else None
    denominators = Denominators(float(mask.sum()), batch.num_sequences)
    result = policy_loss(config, current, -current.detach().clamp(min=-50), batch, denominators, statistics)
    result.loss.backward()
    return result.loss, current.grad, result.sums.finalise()


EXTREMES = [(-INF, -1, -1), (-1, -INF, -1), (-1, -1, -INF), (-INF, -INF, -1), (-INF, -INF, -INF), (-60, -1, -90)]


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_impossible_tokens_and_huge_ratios_stay_finite(settings, dtype):
    loss, gradient, metrics = run(settings, EXTREMES, ids=[0, 0, 0, 1, 1, 2], dtype=dtype)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.dtype == dtype
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_batch_without_sampled_tokens_has_zero_loss_and_zero_gradient(settings):
    columns = [(math.nan, math.nan, math.nan), (-INF, -1, -1)]
    loss, gradient, metrics = run(settings, columns, mask=[0.0, 0.0])
    assert loss.item() == 0.0
    assert gradient.tolist() == [0.0, 0.0]
    assert metrics == {}


@pytest.mark.parametrize("settings", VARIANTS)
def test_what_unsampled_positions_hold_does_not_matter(settings):
    sampled = [(-1.0, -1.1, -1.2), (-0.4, -0.5, -0.6)]
    alone = run(settings, sampled)
    # the advantage of a token goes by its position's parity: keep both
    padded = run(settings, [*sampled, (math.nan, math.nan, math.nan), (-INF, 0, 5)], mask=[1.0, 1, 0, 0])
    assert padded[0].item() == pytest.approx(alone[0].item())
    assert padded[1].tolist() == pytest.approx([*alone[1].tolist(), 0.0, 0.0])
    assert padded[2] == pytest.approx(alone[2])


@pytest.mark.parametrize("settings", VARIANTS)
def test_one_token_sequences_work(settings):
    loss, gradient, _ = run(settings, [(-1.0, -1.1, -1.2), (-0.4, -0.5, -0.6)], ids=[0, 1])
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_batch_that_is_all_stale_has_no_gradient_but_every_metric(settings):
    loss, gradient, metrics = run(settings, EXTREMES, ids=[0, 0, 0, 1, 1, 2], fresh=0.0)
    assert loss.item() == 0.0
    assert gradient.tolist() == [0.0] * 6
    assert (metrics["correction/stale_fraction"], metrics["correction/trained_fraction"]) == (1.0, 0.0)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_broken_forward_pass_is_not_hidden():
    loss, _, _ = run({}, [(math.nan, -1, -1), (-1, -1, -1)])
    assert loss.isnan()


def test_log_ratios_follow_the_documented_table():
    numerator = torch.tensor([-INF, -1.0, -INF, -1.0, -1.0])
    denominator = torch.tensor([-1.0, -INF, -INF, -50.0, math.nan])
    logs = log_ratio(numerator, denominator, torch.tensor([1.0, 1, 1, 1, 0]))
    assert logs.tolist() == [-300.0, 300.0, 0.0, 49.0, 0.0]
    assert ratio(logs).log().tolist() == pytest.approx([-20.0, 20.0, 0.0, 20.0, 0.0])


def test_half_precision_differences_are_taken_in_float32():
    a, b = torch.tensor([-10.0], dtype=torch.bfloat16), torch.tensor([-0.01], dtype=torch.bfloat16)
    assert log_ratio(a, b, torch.ones(1)).item() == pytest.approx(a.float().item() - b.float().item())
