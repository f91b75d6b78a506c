"""Checkpoints: what is read equals what transformers reads, what cannot be run is refused by its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slime_async.actors.embedded.checkpoint import read_config, read_tensors
from slime_async.actors.embedded.engine import EmbeddedEngine
from tests.contract.reference import Checkpoints, tensors_of


def write_config(directory: Path, checkpoint: Path, **changes: Any) -> Path:
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("architecture", "changes", "field"),
    [
        ("qwen3", {"model_type": "mamba2"}, "model_type = 'mamba2'"),
        ("qwen3-moe", {}, "model_type = 'qwen3_moe'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*sliding_attention"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("qwen3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config = .*awq"),
        ("llama3", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type = 'yarn'"),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
    ],
)
def test_a_model_that_would_be_computed_wrongly_is_refused_by_its_field(
    architecture: str, changes: dict[str, Any], field: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    write_config(tmp_path, checkpoints(architecture), **changes)
    with pytest.raises(ValueError, match=field) as refusal:
        EmbeddedEngine(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)
    assert "sglang" in str(refusal.value)


def test_a_directory_without_a_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        read_config(tmp_path)


def test_shards_are_read_by_their_index_and_a_missing_one_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    tensors = tensors_of(checkpoints())
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    read = dict(read_tensors(tmp_path))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in names)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors does not exist"):
        dict(read_tensors(tmp_path))


def test_older_checkpoints_name_their_rope_in_two_fields(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama3")
    rope = json.loads((checkpoint / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    write_config(tmp_path, checkpoint, rope_parameters=None, rope_scaling=rope, rope_theta=theta)
    assert read_config(tmp_path) == read_config(checkpoint)


def test_llama3_scaling_equals_that_of_transformers(tmp_path: Path) -> None:
    """Of Llama 3.1 8B: fast, slow and blended wavelengths all occur."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(max_position_embeddings=131072, hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(read_config(tmp_path).inverse_frequencies(), expected, rtol=1e-6, atol=0)
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    stretch = plain / expected
    assert {"kept", "blended", "stretched"} == {
        "kept" if s < 1.01 else "stretched" if s > 7.99 else "blended" for s in stretch.tolist()
    }
