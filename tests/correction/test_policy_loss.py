"""The learner's entry point: configured as other projects are, it gives their loss and gradient; and it adds up."""

import dataclasses

import pytest
import torch

from slime_async.config.algorithm import PRESETS, AlgorithmConfig
from slime_async.correction import BatchStatistics, Denominators, MetricSums, PolicyBatch, batch_statistics, policy_loss

AREAL, SLIME, VERL = "areal_decoupled_ppo_paper_form", "slime_policy_loss_and_corrections", "verl_policy_loss"
VERL_CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
TIS = {"weight": "truncate", "weight_upper": 2.0}
SAMPLES = {"clip_high": 0.28, "aggregation": "seq-mean-token-mean"}

AS_CONFIGURED_ELSEWHERE = [
    (AREAL, "areal_paper/{}/cap=5.0/{{'eps_clip': 0.2}}", {}),
    (AREAL, "areal_paper/{}/cap=2.0/{{'eps_clip': 0.2, 'c_clip': 3.0}}", {"weight_upper": 2.0, "dual_clip": 3.0}),
    (SLIME, "slime/grpo/{}/none", {"preset": "none", **SAMPLES}),
    (SLIME, "slime/grpo/{}/vanilla_tis", {"preset": "tis", **SAMPLES}),
    (SLIME, "slime/grpo/{}/icepop", {"preset": "icepop", "weight_upper": 2.0, **SAMPLES}),
    (SLIME, "slime/gspo/{}/vanilla_tis", {"preset": "gspo", **SAMPLES, "clip_low": 0.2}),
    (SLIME, "slime/cispo/{}/vanilla_tis", {"preset": "cispo", **SAMPLES}),
    (
        SLIME,
        "slime/grpo/{}/mis_seq_truncate+geo_rs+veto",
        {
            "preset": "tis-sequence",
            "weight_normalize": True,
            "reject": "sequence-mean",
            "reject_lower": 0.8,
            "reject_upper": 1.2,
            "veto": 0.01,
            **SAMPLES,
        },
    ),
    (VERL, "verl/vanilla/{}/none/token-mean", {"preset": "none", **VERL_CLIP}),
    (VERL, "verl/vanilla/{}/token_tis_2/token-mean", {"preset": "tis", **VERL_CLIP}),
    (VERL, "verl/vanilla/{}/sequence_tis_2/token-mean", {"preset": "tis-sequence", **VERL_CLIP}),
    (VERL, "verl/vanilla/{}/token_tis_2/seq-mean-token-sum", {**TIS, **VERL_CLIP, "aggregation": "seq-mean-token-sum"}),
]


@pytest.mark.parametrize(("file", "identity", "settings"), AS_CONFIGURED_ELSEWHERE)
def test_configured_as_another_project_it_gives_that_projects_loss(packed, reference_case, file, identity, settings):
    expected = reference_case(file, identity.format(packed.name))["expected"]
    config = AlgorithmConfig(**settings)
    # slime's reducer sums over samples where ours averages
    scale = len(packed.lengths) if file == SLIME else 1.0
    statistics = batch_statistics(config, [packed.batch])
    loss = policy_loss(config, packed.current, None, packed.batch, packed.denominators, statistics).loss * scale
    assert loss.item() == pytest.approx(expected.get("loss", expected.get("loss_sum_of_sample_means")), rel=1e-9)
    for ours, theirs in zip(packed.gradient(loss), expected["grad_cur_logp"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def sequence_of(batch: PolicyBatch, index: int) -> tuple[PolicyBatch, torch.Tensor]:
    chosen = batch.sequence_ids == index
    columns = {
        field.name: getattr(batch, field.name)[chosen]
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), torch.Tensor)
    }
    columns["sequence_ids"] = torch.zeros_like(columns["sequence_ids"])
    return dataclasses.replace(batch, num_sequences=1, **columns), chosen


@pytest.mark.parametrize("preset", PRESETS)
def test_microbatches_add_up_to_the_batch(stale, preset):
    config = AlgorithmConfig(preset=preset, kl_coef=0.1, entropy_coef=0.01, kl_form="unbiased")
    entropy = -stale.current.detach()
    statistics = batch_statistics(config, [stale.batch]) if config.needs_batch_statistics else None
    whole = policy_loss(config, stale.current, entropy, stale.batch, stale.denominators, statistics)
    loss, sums = torch.zeros(()), MetricSums.zero()
    for index in range(3):
        part, chosen = sequence_of(stale.batch, index)
        result = policy_loss(config, stale.current[chosen], entropy[chosen], part, stale.denominators, statistics)
        loss, sums = loss + result.loss, sums.merge(result.sums)
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    assert sums.finalise() == pytest.approx(whole.sums.finalise(), rel=1e-12)


def test_a_missing_prox_stands_for_the_current_policy(stale):
    on_step = dataclasses.replace(stale.batch, prox_logprobs=None)
    given = dataclasses.replace(stale.batch, prox_logprobs=stale.current.detach())
    losses = [policy_loss(AlgorithmConfig(), stale.current, None, b, stale.denominators).loss for b in (on_step, given)]
    assert losses[0].item() == losses[1].item()
    assert stale.gradient(losses[0]) == stale.gradient(losses[1])


def test_stale_tokens_lose_gradient_but_stay_in_the_denominator(stale):
    masked = stale.batch.weight_mask.clone()
    masked[1] = 0.0
    plain = AlgorithmConfig(preset="none")
    whole = policy_loss(plain, stale.current, None, stale.batch, stale.denominators).loss
    result = policy_loss(
        plain, stale.current, None, dataclasses.replace(stale.batch, weight_mask=masked), stale.denominators
    )
    before, after = stale.gradient(whole)[0], stale.gradient(result.loss)[0]
    assert after[1] == 0.0
    assert after[2:] == before[2:]
    assert result.sums.finalise()["correction/stale_fraction"] == pytest.approx(1 / 12)


def test_a_mask_divides_by_the_count_before_masking(stale):
    """Dividing by what is left would make the survivors louder the more is rejected."""
    config = AlgorithmConfig(preset="none", reject="token", reject_lower=0.5, reject_upper=2.0)
    result = policy_loss(config, stale.current, None, stale.batch, stale.denominators)
    kept = round(12 * (1 - result.sums.finalise()["correction/rejected_fraction"]))
    assert kept == 5
    unmasked = policy_loss(AlgorithmConfig(preset="none"), stale.current, None, stale.batch, stale.denominators).loss
    survivors = [(a, b) for a, b in zip(stale.gradient(result.loss)[2], stale.gradient(unmasked)[2], strict=True) if a]
    assert all(a == b for a, b in survivors)
    counted_after = policy_loss(config, stale.current, None, stale.batch, Denominators(float(kept), 3)).loss
    assert counted_after.item() == pytest.approx(result.loss.item() * 12 / 5)


@pytest.mark.parametrize(
    ("settings", "missing", "words"),
    [
        ({"kl_coef": 0.1}, {"ref_logprobs": None}, "kl_coef = 0.1 needs ref_logprobs"),
        ({"entropy_coef": 0.1}, {}, "entropy_coef = 0.1 needs the entropy"),
        ({"preset": "m2po"}, {}, "batch_statistics"),
    ],
)
def test_a_missing_column_is_refused_by_name(stale, settings, missing, words):
    batch = dataclasses.replace(stale.batch, **missing)
    with pytest.raises(ValueError, match=words):
        policy_loss(AlgorithmConfig(**settings), stale.current, None, batch, stale.denominators)


def test_batch_statistics_need_prox_and_come_from_all_parts_together(stale):
    config = AlgorithmConfig(preset="m2po", weight_normalize=True)
    whole = batch_statistics(config, [stale.batch])
    parts = [sequence_of(stale.batch, index)[0] for index in range(3)]
    assert batch_statistics(config, parts) == whole
    gathered = batch_statistics(config, parts[:1], gather=lambda own: torch.cat([own, own]))
    assert gathered == batch_statistics(config, [parts[0], parts[0]])
    with pytest.raises(ValueError, match="recompute"):
        batch_statistics(config, [dataclasses.replace(stale.batch, prox_logprobs=None)])
    assert batch_statistics(AlgorithmConfig(), [stale.batch]) == BatchStatistics()


@pytest.mark.parametrize("objective", ["ppo-clip", "gspo", "gspo-token"])
def test_objectives_with_a_ratio_have_the_gradient_of_their_value(objective, packed):
    """Numerically, away from kinks; GSPO-token, whose gradient is not its value's, is held against GSPO."""
    config = AlgorithmConfig(objective=objective, kl_coef=0.1, kl_form="unbiased", aggregation="seq-mean-token-mean")

    def loss(current: torch.Tensor) -> torch.Tensor:
        return policy_loss(config, current, None, packed.batch, packed.denominators).loss

    if objective != "gspo-token":
        assert torch.autograd.gradcheck(loss, (packed.current,))
        return
    uniform = {"preset": "none", "aggregation": "seq-mean-token-mean"}
    losses = [
        policy_loss(AlgorithmConfig(**uniform, objective=name), packed.current, None, packed.batch, packed.denominators)
        for name in ("gspo", "gspo-token")
    ]
    for gspo, per_token in zip(*(packed.gradient(result.loss) for result in losses), strict=True):
        assert gspo == pytest.approx(per_token, rel=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "reinforce", "weight": "truncate", "reject": "token", "reject_lower": 0.2, "reject_upper": 4.0},
        {"dual_clip": 3.0, "weight": "drop", "aggregation": "seq-mean-token-sum"},
        {"dual_clip": 3.0, "weight_level": "sequence", "aggregation": "seq-mean-token-sum-norm", "horizon_tokens": 9.0},
        {"clip_low": None, "clip_high": None, "veto": 0.01, "aggregation": "seq-mean-token-mean"},
        {"prox": "bypass", "weight": "none", "kl_coef": 0.2, "kl_form": "k2"},
    ],
)
def test_losses_have_the_gradient_of_their_value_in_log_probs_and_entropy(settings, packed):
    """Numerically, for objectives and aggregations of which the reference files have no gradients."""
    config = AlgorithmConfig(entropy_coef=0.3, **settings)
    entropy = (-0.5 * packed.current.detach()).requires_grad_()

    def loss(current: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return policy_loss(config, current, entropy, packed.batch, packed.denominators).loss

    assert torch.autograd.gradcheck(loss, (packed.current, entropy))
