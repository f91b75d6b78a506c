"""The profiles for 1 to 1,024 GPUs: what each says of its machines, and that our own code would take it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from slime_async.cli.launch_slurm import task_resources
from slime_async.cli.slurm_job import run_script
from slime_async.config import Config, load_config
from slime_async.learner.megatron.architecture import Architecture
from slime_async.learner.megatron.options import check_layout, parse_options
from tests.docs.pages import ROOT

PROFILES = sorted((ROOT / "examples" / "profiles").glob("gpus-*.toml"), key=lambda path: int(path.stem[5:]))
QWEN3 = {
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "head_dim": 128,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-1.7B": {"num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 6144},
    "Qwen3-8B": {"num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 12288},
    "Qwen3-32B": {"num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64, "intermediate_size": 25600},
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
"""As their config.json files have them"""


def architecture(config: Config) -> Architecture:
    return Architecture.parse({"model_type": "qwen3", **QWEN3, **SHAPES[Path(config.model.path).name]})


def engine_gpus(config: Config) -> int:
    return int(config.sglang.get("tp_size", 1))


def test_there_is_a_profile_for_each_size() -> None:
    assert [path.stem for path in PROFILES] == ["gpus-1", "gpus-8", "gpus-64", "gpus-1024"]


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_profile_uses_the_gpus_that_it_is_named_for(path: Path) -> None:
    config = load_config(path)
    cluster, gpus = config.cluster, int(path.stem[5:])
    assert cluster.actor_gpus * config.actor.count + cluster.learner_gpus * config.learner.ranks == gpus
    if cluster.actor_gpus:
        assert cluster.actor_gpus == config.actor.engines * engine_gpus(config)
    if gpus > 8:
        assert cluster.learner_ranks_per_node == 8
        assert cluster.actor_gpus == 8


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_megatron_can_lay_the_model_out_so(path: Path) -> None:
    config = load_config(path)
    options = parse_options(config.megatron, config.learner.ranks)
    check_layout(options.layout, architecture(config), config.megatron)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_an_answer_of_full_length_fits_everywhere(path: Path) -> None:
    config = load_config(path)
    assert config.learner.microbatch_tokens >= config.sampling.max_context_tokens
    assert config.actor.slots >= config.actor.engines * int(config.sglang["max_running_requests"])


@pytest.mark.parametrize("path", [path for path in PROFILES if int(path.stem[5:]) > 8], ids=lambda path: path.stem)
def test_large_profiles_make_a_job_script(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    script = run_script(config, path, tmp_path)
    assert script.count("#SBATCH hetjob") == 2
    assert re.search(r"--gpus-per-task=(h200:)?8\b", script)
    assert f"--nodes={config.learner.ranks // 8} " in script
    assert config.checkpoint.interval_steps
    assert f"--ntasks={config.actor.count}" in task_resources("actor", config.cluster, config.actor.count)
