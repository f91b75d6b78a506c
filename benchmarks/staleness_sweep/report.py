"""The sweep's table, JSON and plot, from whatever cells are finished."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.staleness_sweep.cells import METHODS, STALENESS, Cell, Protocol
from benchmarks.staleness_sweep.statistics import CONTROL, Entry, Estimate, steps_to_target, summarise
from benchmarks.staleness_sweep.store import write_json
from benchmarks.staleness_sweep.training import CellResult

MISSING = "·"
"""Stands in tables for a pair without a finished cell"""
SHOWN_MISSING = 12
"""The JSON names all of them"""


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
    """By method and η: mean over seeds ± 95% interval, (seeds)."""
    lines = [
        *_table(f"Held-out sampled accuracy after {protocol.steps} steps", entries, lambda e: _interval(e.accuracy, 3)),
        *_table(
            f"Steps to {target:g} (in how many of the seeds, where not in all)",
            entries,
            lambda e: _steps(e, protocol.steps),
        ),
        *_table(
            f"Accuracy less that of `{CONTROL}` with the same seed and η",
            [entry for entry in entries if entry.method != CONTROL],
            lambda e: MISSING if e.gain is None else _interval(e.gain, 3, signed=True),
        ),
        *_table(
            "Mismatch KL: k3 of π_prox/μ, batches of full staleness",
            entries,
            lambda e: MISSING if e.mismatch_kl is None else f"{e.mismatch_kl:.2g}",
        ),
    ]
    if missing:
        named = ", ".join(missing[:SHOWN_MISSING]) + (", …" if len(missing) > SHOWN_MISSING else "")
        lines += [f"{len(missing)} cells are not finished ({MISSING}, or fewer seeds): {named}", ""]
    hours = sum(result.seconds for result in results.values()) / 3600
    return "\n".join([*lines, f"{len(results)} cells, {hours:.1f} h in all"])


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
        if entry.gain is not None and entry.method != CONTROL:
            figures[f"gain/{key}"] = round(entry.gain.mean, 4)
            figures[f"gain_ci95/{key}"] = _rounded(entry.gain.half_width, 4)
        if entry.mismatch_kl is not None:
            figures[f"mismatch_kl/{key}"] = float(f"{entry.mismatch_kl:.4g}")
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


def _table(title: str, entries: Sequence[Entry], show: Callable[[Entry], str]) -> list[str]:
    """Methods down, η across."""
    by_pair = {(entry.method, entry.staleness): show(entry) for entry in entries}
    lines = [f"{title}:", "", f"| method | {' | '.join(f'η = {staleness}' for staleness in STALENESS)} |"]
    lines.append(f"|---|{'---|' * len(STALENESS)}")
    for method in dict.fromkeys(entry.method for entry in entries):
        cells = [by_pair.get((method, staleness), MISSING) for staleness in STALENESS]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def _steps(entry: Entry, steps: int) -> str:
    if entry.steps_to_target is None:
        return f"> {steps} (0/{entry.accuracy.count})"
    if entry.reached == entry.accuracy.count:
        return _interval(entry.steps_to_target, 0)
    return f"{entry.steps_to_target.mean:.0f} ({entry.reached}/{entry.accuracy.count})"


def _interval(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    mean = f"{estimate.mean:+.{digits}f}" if signed else f"{estimate.mean:.{digits}f}"
    half_width = "" if estimate.half_width is None else f" ± {estimate.half_width:.{digits}f}"
    return f"{mean}{half_width} ({estimate.count})"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
