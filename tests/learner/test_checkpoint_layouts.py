"""A checkpoint of one layout is gone on from under another: real processes, and one rank at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_layout_job import begin_or_load, make_config, two_more
from test_layouts import TWO_RANKS, run_ranks

from slime_async.learner.trainer import Trainer

JOB = Path(__file__).with_name("checkpoint_layout_job.py")
DISTRIBUTED = {"use_distributed_optimizer": True}


def hand_over(layouts: list[dict[str, Any]], ranks: int, model: Path, out: Path) -> None:
    """Each layout goes on from the checkpoint of the one before, then one rank does; all give what one rank gives."""
    run_ranks(ranks, model, out, layouts, JOB)
    results = {str(layout): json.loads((out / f"layout{i}.json").read_text()) for i, layout in enumerate(layouts)}
    for name, source in (("straight", None), ("one rank", out / f"checkpoint{len(layouts) - 1}")):
        trainer = Trainer.build(make_config({}), model)
        begin_or_load(trainer, source)
        results[name] = two_more(trainer)
        trainer.close()
    expected = results.pop("straight")
    for name, result in results.items():
        assert result[0] == pytest.approx(expected[0], rel=2e-5), name
        assert result[1] == pytest.approx(expected[1], rel=2e-5), name


def test_a_checkpoint_of_two_tensor_parallel_ranks_goes_on_under_two_stages_and_then_on_one_rank(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    """The distributed optimizer between them has several buckets: the model is tied, and its vocabulary is padded."""
    layouts = [TWO_RANKS["TP2"], TWO_RANKS["PP2"], DISTRIBUTED]
    hand_over(layouts, 2, checkpoints("qwen3"), tmp_path / "out")


@pytest.mark.slow
def test_experts_and_context_parallel_ranks_hand_over_too(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    experts = {"expert_model_parallel_size": 2}
    layouts = [experts | DISTRIBUTED, TWO_RANKS["PP2"], TWO_RANKS["TP2"] | {"expert_tensor_parallel_size": 2}, experts]
    hand_over(layouts, 2, checkpoints("qwen3-moe"), tmp_path / "experts")
    hand_over([TWO_RANKS["CP2"] | DISTRIBUTED, TWO_RANKS["TP2"]], 2, checkpoints("llama3"), tmp_path / "context")


@pytest.mark.slow
def test_four_ranks_hand_over(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    layouts = [TWO_RANKS["TP2"] | TWO_RANKS["PP2"], TWO_RANKS["TP2"] | DISTRIBUTED, TWO_RANKS["PP2"] | DISTRIBUTED]
    hand_over(layouts, 4, checkpoints("qwen3"), tmp_path / "out")


@pytest.mark.slow
def test_interleaved_stages_hand_over(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    stages = {"pipeline_model_parallel_size": 3}
    layouts = [stages | {"virtual_pipeline_model_parallel_size": 2}, stages | DISTRIBUTED]
    hand_over([*layouts, layouts[0] | DISTRIBUTED], 3, checkpoints("qwen3-deep"), tmp_path / "out")
