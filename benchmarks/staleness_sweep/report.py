"""The sweep's table, JSON and plot, from whatever cells are finished."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.staleness_sweep.cells import METHODS, STALENESS, Cell, Protocol
from benchmarks.staleness_sweep.statistics import Entry, Estimate, steps_to_target, summarise
from benchmarks.staleness_sweep.store import write_json
from benchmarks.staleness_sweep.training import CellResult

MISSING = "·"
"""Stands in tables for a pair without a finished cell"""


def write_report(
    results: Mapping[Cell, CellResult], wanted: Sequence[Cell], protocol: Protocol, target: float, path: Path
) -> str:
    """Write ``path`` (JSON) and the plot beside it; the tables as Markdown."""
    entries = summarise(results, target)
    missing = [cell.name for cell in wanted if cell not in results]
    write_json(path, as_json(results, entries, missing, protocol, target))
    from benchmarks.staleness_sweep.plot import draw  # matplotlib, which only the report needs

    draw(entries, protocol, target, path.with_suffix(".png"))
    return tables(results, entries, missing, protocol, target)


def tables(
    results: Mapping[Cell, CellResult],
    entries: Sequence[Entry],
    missing: Sequence[str],
    protocol: Protocol,
    target: float,
) -> str:
    """Accuracy and steps to the target by method and η: mean over seeds ± 95% interval, (seeds)."""
    by_pair = {(entry.method, entry.staleness): entry for entry in entries}
    lines = [f"Held-out sampled accuracy after {protocol.steps} steps:", "", *_head()]
    for method in _methods(entries):
        cells = [_accuracy(by_pair.get((method, staleness))) for staleness in STALENESS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", f"Steps to {target:g} (in how many of the seeds it was reached):", "", *_head()]
    for method in _methods(entries):
        cells = [_steps(by_pair.get((method, staleness)), protocol.steps) for staleness in STALENESS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    if missing:
        lines += ["", f"{len(missing)} cells are not finished ({MISSING}, or fewer seeds): {', '.join(missing)}"]
    hours = sum(result.seconds for result in results.values()) / 3600
    return "\n".join([*lines, "", f"{len(results)} cells, {hours:.1f} h in all"])


def as_json(
    results: Mapping[Cell, CellResult],
    entries: Sequence[Entry],
    missing: Sequence[str],
    protocol: Protocol,
    target: float,
) -> dict[str, Any]:
    """``figures`` by name, and all that they were made of."""
    figures: dict[str, float | int | None] = {}
    for entry in entries:
        key = f"{entry.method}/eta_{entry.staleness}"
        figures[f"accuracy/{key}"] = round(entry.accuracy.mean, 4)
        figures[f"accuracy_ci95/{key}"] = _rounded(entry.accuracy.half_width, 4)
        figures[f"seeds/{key}"] = entry.accuracy.count
        figures[f"target_reached/{key}"] = entry.reached
        if entry.steps_to_target is not None:
            figures[f"steps_to_target/{key}"] = round(entry.steps_to_target.mean, 1)
            figures[f"steps_to_target_ci95/{key}"] = _rounded(entry.steps_to_target.half_width, 1)
    cells = [
        {**cell._asdict(), "steps_to_target": steps_to_target(result, target), **dataclasses.asdict(result)}
        for cell, result in results.items()
    ]
    return {
        "figures": figures,
        "protocol": {**protocol.as_dict(), "target": target},
        "methods": METHODS,
        "missing_cells": list(missing),
        "cells": cells,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def _head() -> list[str]:
    return [
        f"| method | {' | '.join(f'η = {staleness}' for staleness in STALENESS)} |",
        f"|---|{'---|' * len(STALENESS)}",
    ]


def _methods(entries: Sequence[Entry]) -> list[str]:
    return [method for method in METHODS if any(entry.method == method for entry in entries)]


def _accuracy(entry: Entry | None) -> str:
    return MISSING if entry is None else _with_interval(entry.accuracy, 3)


def _steps(entry: Entry | None, steps: int) -> str:
    if entry is None:
        return MISSING
    if entry.steps_to_target is None:
        return f"> {steps} (0/{entry.accuracy.count})"
    mean = f"{entry.steps_to_target.mean:.0f}"
    if entry.reached == entry.accuracy.count:
        return _with_interval(entry.steps_to_target, 0)
    return f"{mean} ({entry.reached}/{entry.accuracy.count})"


def _with_interval(estimate: Estimate, digits: int) -> str:
    half_width = "" if estimate.half_width is None else f" ± {estimate.half_width:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{half_width} ({estimate.count})"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
