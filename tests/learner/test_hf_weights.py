"""Hugging Face weights in and out, and what the model computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_checkpoints import ARCHITECTURES
from transformers import AutoModelForCausalLM

from slime_async.learner.megatron.architecture import Architecture
from slime_async.learner.trainer import Trainer

MakeTrainer = Callable[..., Trainer]
Checkpoints = Callable[[str], Path]


def random_sequences(lengths: tuple[int, ...] = (5, 9, 40, 1, 2, 13, 17, 33)) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 33, n).astype(np.int32) for n in lengths]


def reference_logprobs(model: torch.nn.Module, token_ids: NDArray[np.int32], temperature: float) -> torch.Tensor:
    """[T − 1], by transformers, one sequence at a time."""
    ids = torch.from_numpy(token_ids).long()
    with torch.no_grad():
        logits = model(ids[None]).logits[0] / temperature
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_logprobs_equal_those_of_transformers(
    architecture: str, make_trainer: MakeTrainer, checkpoints: Checkpoints
) -> None:
    trainer = make_trainer(
        architecture, sampling={"temperature": 0.7}, learner={"microbatch_tokens": 70}, batch={"groups": 1}
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoints(architecture), dtype=torch.float32).eval()
    sequences = random_sequences()
    for token_ids, logprobs in zip(sequences, trainer.logprobs(sequences), strict=True):
        assert logprobs.shape == token_ids.shape
        assert logprobs[0] == 0
        expected = reference_logprobs(model, token_ids, 0.7)
        torch.testing.assert_close(torch.from_numpy(logprobs[1:]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_goes_in_and_out_bitwise(
    architecture: str, make_trainer: MakeTrainer, checkpoints: Checkpoints
) -> None:
    trainer = make_trainer(architecture)
    source = load_file(checkpoints(architecture) / "model.safetensors")
    exported = dict(trainer.export())
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_manifest_names_what_is_exported_in_its_order(architecture: str, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(architecture)
    exported = [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in trainer.export()]
    assert exported == [(t.name, t.dtype, t.shape) for t in trainer.manifest().tensors]


def test_a_saved_checkpoint_loads_in_transformers_and_keeps_the_other_files(
    make_trainer: MakeTrainer, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    tokenizer = checkpoints("qwen3") / "tokenizer_config.json"
    tokenizer.write_text("{}")
    trainer = make_trainer("qwen3")
    sequences = random_sequences()
    trainer.train_supervised([(s, np.ones(len(s), dtype=np.uint8)) for s in sequences], 1e-2)
    trainer.save_hf(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert (tmp_path / "saved" / "tokenizer_config.json").read_text() == "{}"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    logprobs = trainer.logprobs(sequences)[2]
    torch.testing.assert_close(
        torch.from_numpy(logprobs[1:]), reference_logprobs(model, sequences[2], 1.0), rtol=0, atol=1e-4
    )


def test_packing_together_or_apart_gives_the_same_logprobs(make_trainer: MakeTrainer) -> None:
    sequences = random_sequences()
    trainer = make_trainer("qwen3")
    together = trainer.logprobs(sequences)
    for token_ids, logprobs in zip(sequences, together, strict=True):
        np.testing.assert_allclose(trainer.logprobs([token_ids])[0], logprobs, rtol=0, atol=2e-6)


def test_a_missing_tensor_is_named(make_trainer: MakeTrainer, checkpoints: Checkpoints, tmp_path: Path) -> None:
    trainer = make_trainer("qwen3")
    (tmp_path / "config.json").write_text((checkpoints("qwen3") / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no tensor model\.embed_tokens\.weight"):
        trainer.model.weights.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, qwen2"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope scaling"),
    ],
)
def test_a_model_that_megatron_would_compute_otherwise_is_refused(
    change: dict[str, object], message: str, checkpoints: Checkpoints
) -> None:
    config = json.loads((checkpoints("qwen3") / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        Architecture.parse(config | change)


def test_rope_settings_of_older_transformers_are_read(checkpoints: Checkpoints) -> None:
    config = json.loads((checkpoints("llama3") / "config.json").read_text())
    new = Architecture.parse(config)
    rope = config.pop("rope_parameters")
    old = Architecture.parse(config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope})
    assert old == new
    assert (old.rope_theta, old.rope_factor) == (500000.0, 8.0)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a Hugging Face checkpoint directory"):
        Architecture.read(tmp_path)
