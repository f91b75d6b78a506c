"""The algorithm's configuration: presets, overrides, and what is refused."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from slime_async.config.algorithm import PRESETS, AlgorithmConfig, PresetName


def test_the_default_is_decoupled_ppo_in_the_papers_form():
    config = AlgorithmConfig()
    assert (config.preset, config.prox, config.weight, config.weight_upper) == ("decoupled-ppo", "recompute", "drop", 5)
    assert config == AlgorithmConfig(preset="decoupled-ppo")


def test_a_field_that_is_set_wins_over_the_preset():
    config = AlgorithmConfig(preset="icepop", weight_upper=3.0)
    assert (config.weight, config.weight_lower, config.weight_upper) == ("drop", 0.5, 3.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_survives_being_written_down(preset):
    config = AlgorithmConfig(preset=preset)
    assert AlgorithmConfig.model_validate(config.model_dump()) == config
    assert AlgorithmConfig.model_validate_json(config.model_dump_json()) == config


def test_every_preset_that_can_be_named_exists():
    assert set(PRESETS) == set(PresetName.__args__)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "magic"}, "decoupled-ppo"),
        ({"weight_lower": 6.0}, r"weight_lower = 6.0 is not below weight_upper = 5.0"),
        ({"weight_upper": 0.9}, "weight_upper = 0.9 drops on-policy tokens"),
        ({"weight_lower": 1.0}, "weight_lower = 1.0 drops on-policy tokens"),
        ({"prox": "bypass"}, "set weight = 'none' and reject = 'none', or prox = 'recompute'"),
        ({"reject": "token"}, "set reject_upper"),
        ({"reject": "token", "reject_statistic": "k3", "reject_lower": 0.5}, "reject_statistic = 'k1'"),
        ({"reject": "sequence-max", "reject_upper": 2.0}, "'k2' or 'k3'"),
        ({"objective": "topr"}, "set prox = 'bypass', not 'recompute'"),
        ({"preset": "m2po", "prox": "interpolate"}, "set prox = 'recompute', not 'interpolate'"),
        ({"preset": "none", "weight_normalize": True}, "weight_normalize needs a weight"),
        ({"preset": "cispo", "dual_clip": 3.0}, "'cispo'"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": float("inf")}, "leave the field out to have no bound"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "set horizon_tokens"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"objective": "v-trace"}, "objective"),
        ({"clip_hihg": 0.2}, "clip_hihg"),
    ],
)
def test_impossible_settings_are_refused_with_the_remedy(settings, words):
    with pytest.raises(ValidationError, match=words):
        AlgorithmConfig(**settings)


def test_every_field_says_what_it_is_for():
    assert all(field.description for field in AlgorithmConfig.model_fields.values())


def test_reading_the_configuration_needs_no_torch():
    code = "import sys, slime_async.config.algorithm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
