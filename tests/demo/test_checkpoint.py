"""The demo's checkpoint is an ordinary one: transformers loads model and tokenizer from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from slime_async.actors.tokenizer import load_tokenizer, stop_token_ids
from slime_async.demo.model import make_checkpoint
from slime_async.demo.tokenizer import VOCABULARY


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "new"
    make_checkpoint(directory, seed=0)
    return directory


def test_transformers_loads_every_weight_and_misses_none(checkpoint: Path) -> None:
    model, loading = Qwen3ForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 432_736
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_fresh_model_is_close_to_uniform_over_the_vocabulary(checkpoint: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[10, 5, 2, 9, 1, 7, 12]])).logits
    loss = -logits.log_softmax(-1).mean()
    assert abs(float(loss) - torch.tensor(16.0).log()) < 0.1


def test_weights_depend_on_the_seed_alone(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    make_checkpoint(tmp_path / "same", seed=0)
    make_checkpoint(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the process's own random state is left alone"
    first, same, other = (
        load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_text_survives_the_tokenizer_and_every_id_has_a_text(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.encode("+52917=12579")
    assert ids == [10, 5, 2, 9, 1, 7, 12, 1, 2, 5, 7, 9]
    assert tokenizer.decode(ids) == "+52917=12579"
    assert [tokenizer.decode([i]) for i in range(len(VOCABULARY))] == list(VOCABULARY)
    assert len(tokenizer) == len(VOCABULARY) == 16
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (13, 14)
    assert tokenizer.encode("1x 2") == [1, 15, 15, 2], "foreign characters do not vanish"


def test_the_end_of_an_answer_is_named_by_tokenizer_and_generation_config(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    assert stop_token_ids(checkpoint, tokenizer) == (14,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [13, 14]}')
    assert stop_token_ids(tmp_path, tokenizer) == (13, 14)


def test_a_checkpoint_that_names_no_end_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no end-of-sequence token"):
        stop_token_ids(tmp_path, tokenizer)
