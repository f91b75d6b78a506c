"""benchmarks.learner: what it counts, what it runs first, and a cell of it in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.learner.cells import ours, plan, tiny
from benchmarks.learner.checks import run_checks
from benchmarks.learner.kernels import kind_of
from benchmarks.learner.report import figures, row_line
from benchmarks.learner.shapes import PEAK_FLOPS, SHAPES, batch_lengths
from benchmarks.learner.worker import measure


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name].config()))
    assert SHAPES[name].parameters == sum(p.numel() for p in model.parameters())


def test_the_work_of_attention_is_counted_by_pairs() -> None:
    shape = SHAPES["tiny"]
    dense = 6.0 * shape.parameters
    pairs = 12.0 * shape.layers * shape.heads * shape.head_dim
    assert shape.flops(np.array([100])) == pytest.approx(100 * dense + pairs * 100 * 100 / 2)
    assert shape.flops(np.array([50, 50])) == pytest.approx(100 * dense + pairs * 100 * 50 / 2)


def test_every_batch_has_the_tokens_of_a_step() -> None:
    for sequence in (0, 1024, 8192):
        lengths = batch_lengths(65_536, sequence)
        assert lengths.sum() == 65_536
        assert lengths.max() <= 8192


def test_the_largest_model_comes_first_and_fits_the_memory() -> None:
    large, small = (plan(["4b", "1.7b", "0.6b"], memory_gb, 65_536) for memory_gb in (150.0, 85.0))
    assert large[0] == ours("4b", 2048, 8192, profile=True)
    assert small[0] == ours("4b", 2048, 8192, recompute="full", profile=True)
    for cells in (large, small, tiny(2048)):
        assert len(set(cells)) == len(cells)


def test_figures_are_of_the_best_cells() -> None:
    rows = [
        {"name": "x", "shape": "4b", "sequence": 2048, "trainer": trainer, "wall_s": 1.0}
        | (
            {"tokens_per_s": rate, "mfu": rate / 1e5, "peak_memory_gb": 1.0, "step_s": 1.0}
            if rate
            else {"failed": "no"}
        )
        for trainer, rate in (("slime_async", 100), ("slime_async", 150), ("transformers", 75), ("transformers", 0))
    ]
    assert figures(rows)["tokens_per_s_over_transformers"] == 2.0
    assert figures(rows)["mfu_4b"] == pytest.approx(0.0015)
    assert [bool(row_line(row)) for row in rows] == [True] * 4


def test_kernels_are_told_apart() -> None:
    assert kind_of("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT") == "matrix products"
    assert kind_of("void pytorch_flash::flash_bwd_kernel<...>") == "attention"
    assert kind_of("triton_per_fused__to_copy_mean_mul_0") == "fused by torch.compile"


def test_the_checks_pass_on_a_cpu() -> None:
    checks = run_checks(torch.device("cpu"), torch.float32)
    assert all(check.passed for check in checks), checks


def test_a_cell_is_measured_and_profiled(tmp_path: Path) -> None:
    from megatron.core import parallel_state

    out = tmp_path / "result.json"
    try:
        measure(ours("tiny", 64, 256, profile=True), 512, 1, torch.device("cpu"), out)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    result = json.loads(out.read_text())
    assert result["tokens"] == 512
    assert result["mfu"] == pytest.approx(result["tflops"] * 1e12 / PEAK_FLOPS)
    assert result["time"]["kinds"]
