"""The sweep in small: real engine, queue and trainer, resumed, reported."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.staleness_sweep import cells
from benchmarks.staleness_sweep.__main__ import run
from benchmarks.staleness_sweep.cells import BASELINES, METHODS, STALENESS, Cell, Protocol, cell_config, grid
from benchmarks.staleness_sweep.report import tables
from benchmarks.staleness_sweep.statistics import Estimate, steps_to_target, summarise
from benchmarks.staleness_sweep.store import Store
from benchmarks.staleness_sweep.training import CellResult, run_cell

SMALL = Protocol(steps=4, groups=2, group_size=2, warm_start_steps=1, evaluate_every=2, curve_tasks=4, final_tasks=8)


def reward(content: object, answer: str, finish_reason: str) -> float:
    """What a model that has hardly been trained gets right half the time."""
    return float(len(answer) % 2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of cells of the demo with an easier reward."""
    directory = tmp_path_factory.mktemp("sweep")
    easier = cells.DEMO.read_text().replace("slime_async.demo.sorting:reward", f"{__name__}:reward")
    (directory / "demo.toml").write_text(easier)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "DEMO", directory / "demo.toml")
        yield directory


def arguments(directory: Path, *patterns: str, **changed: object) -> argparse.Namespace:
    defaults = {"seeds": [0], "jobs": 1, "time_limit": 600.0, "report": False, "target": 0.6}
    return argparse.Namespace(
        **{**defaults, "cells": list(patterns), "directory": directory, "out": directory / "out.json", **changed}
    )


@pytest.mark.parametrize(("method", "staleness"), [("decoupled-ppo", 2), ("m2po", 1)])
def test_a_cell_trains_every_batch_at_exactly_its_staleness(directory: Path, method: str, staleness: int) -> None:
    """``run_cell`` raises when any batch is younger or older than min(version, η)."""
    result = run_cell(Cell(method, staleness, 0), SMALL, directory)
    assert result.batches_at_full_staleness == SMALL.steps - staleness
    assert [step for step, _ in result.curve] == [0, 2, 4]
    assert result.metrics["mismatch/k3"] > 1e-9, "weights changed between sampling and training"


def test_without_staleness_what_is_left_of_the_mismatch_is_numerics(directory: Path) -> None:
    result = run_cell(Cell("tis", 0, 0), SMALL, directory)
    assert result.metrics["mismatch/abs_logp_diff_max"] < 1e-4


def test_a_stopped_sweep_goes_on_with_what_is_missing_and_says_so(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(arguments(directory, "none-eta[01]-*", time_limit=0.0), SMALL)
    assert "2 cells are not finished" in capsys.readouterr().out
    run(arguments(directory, "none-eta0-*"), SMALL)
    capsys.readouterr()
    run(arguments(directory, "none-eta[01]-*"), SMALL)
    printed = capsys.readouterr().out
    assert "2 cells, 1 to run" in printed
    assert "not finished" not in printed
    content = json.loads((directory / "out.json").read_text())
    assert content["missing_cells"] == []
    assert content["figures"]["seeds/none/eta_1"] == 1
    assert (directory / "out.png").stat().st_size > 10_000


@pytest.mark.slow
def test_cells_run_side_by_side_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(arguments(tmp_path, "tis-eta[01]-*", jobs=2), SMALL)
    printed = capsys.readouterr().out
    assert "[2/2]" in printed
    assert "not finished" not in printed


def test_cells_of_another_protocol_are_refused(tmp_path: Path) -> None:
    Store(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"'steps': \(4, 120\)"):
        Store(tmp_path, Protocol())


def test_the_grid_is_complete_seed_by_seed_with_its_baselines_last() -> None:
    names = list(grid([0, 1, 2]))
    assert len(names) == len(set(names)) == len(METHODS) * len(STALENESS) * 3
    assert [cell.seed for cell in names] == sorted(cell.seed for cell in names)
    first = [cell.method in BASELINES for cell in names if cell.seed == 0]
    assert first == sorted(first)
    assert [cell.name for cell in grid([0, 1], ["tis-eta4-*"])] == ["tis-eta4-seed0", "tis-eta4-seed1"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_valid_configuration_of_the_demo(method: str, tmp_path: Path) -> None:
    config = cell_config(Cell(method, 16, 1), Protocol(), tmp_path)
    assert (config.algorithm.preset, config.staleness.max_staleness, config.run.seed) == (method, 16, 1)


def test_estimates_are_means_with_students_intervals() -> None:
    estimate = Estimate.of([0.8, 0.9, 1.0])
    assert (estimate.mean, estimate.half_width) == (pytest.approx(0.9), pytest.approx(4.303 * 0.1 / 3**0.5))
    assert Estimate.of([0.5]) == Estimate(0.5, None, 1)
    with pytest.raises(ValueError, match="finished cells"):
        Estimate.of([])


def test_a_target_that_was_not_reached_is_not_averaged_away() -> None:
    fast, slow = CellResult(accuracy=0.9, curve=[(0, 0.3), (10, 0.7)]), CellResult(curve=[(0, 0.3), (10, 0.4)])
    assert (steps_to_target(fast, 0.6), steps_to_target(slow, 0.6)) == (10, None)
    results = {Cell("tis", 0, 0): fast, Cell("tis", 0, 1): slow, Cell("none", 2, 0): slow}
    text = tables(results, summarise(results, 0.6), ["none-eta2-seed1"], Protocol(), 0.6)
    assert "| tis | 10 (1/2) | · |" in text
    assert "| none | · | · | > 120 (0/1) |" in text
    assert "1 cells are not finished" in text


def test_methods_are_compared_with_no_correction_seed_by_seed() -> None:
    """Seeds differ more than methods do: paired differences have the narrower interval."""
    accuracies = {"none": [0.3, 0.6, 0.9], "tis": [0.4, 0.7, 1.0]}
    results = {
        Cell(method, 4, seed): CellResult(accuracy=accuracy)
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    }
    tis = next(entry for entry in summarise(results, 0.6) if entry.method == "tis")
    assert tis.gain is not None
    assert (tis.gain.mean, tis.gain.half_width) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))
    assert tis.accuracy.half_width is not None
    assert tis.accuracy.half_width > 0.7
    del results[Cell("none", 4, 1)]
    paired = next(entry for entry in summarise(results, 0.6) if entry.method == "tis").gain
    assert paired is not None
    assert paired.count == 2
