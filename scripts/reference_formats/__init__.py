"""Formats of reference cases, and the runner of each.

A case's format is told by its own fields, never by its id or its file's name. A runner takes ``(case, inputs,
defaults)`` and returns every value that the case expects, by name; to add a format, add a row to ``FORMATS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from reference_formats import areal, slime, verl
from reference_formats.compare import first_difference
from reference_formats.inputs import Inputs

Runner = Callable[[dict[str, Any], Inputs, dict[str, Any]], dict[str, Any]]


class Format(NamedTuple):
    recognises: Callable[[dict[str, Any]], bool]
    run: Runner


def _has(*fields: str) -> Callable[[dict[str, Any]], bool]:
    return lambda case: all(field in case for field in fields)


def _kind(kind: str) -> Callable[[dict[str, Any]], bool]:
    return lambda case: case.get("kind") == kind


FORMATS: dict[str, Format] = {
    "areal decoupled PPO": Format(_has("ppo", "behav_imp_weight_cap"), areal.decoupled_ppo),
    "verl importance weights": Format(_kind("is_weights"), verl.importance_weights),
    "verl rejection mask": Format(_kind("rs_mask"), verl.rejection),
    "verl off-policy metrics": Format(_kind("offpolicy_metrics"), verl.off_policy_metrics),
    "verl policy loss": Format(_has("loss", "loss_agg_mode"), verl.policy_loss),
    "slime OPSM": Format(_kind("opsm"), slime.off_policy_sequence_mask),
    "slime policy loss": Format(_has("estimator", "correction"), slime.policy_loss),
}


def check_files(files: Iterable[Path], inputs_path: Path | None = None) -> tuple[int, list[str]]:
    """How many cases passed, and one line per failure."""
    passed, failures = 0, []
    for path in files:
        content = json.loads(path.read_text())
        batches_path = inputs_path or path.with_name("inputs.json")
        batches = json.loads(batches_path.read_text())["batches"] if batches_path.exists() else {}
        for number, case in enumerate(content["cases"]):
            problem = check_case(case, batches, content.get("defaults") or {})
            if problem is None:
                passed += 1
            else:
                failures.append(f"FAILED {path.name}: {case.get('id', f'case {number}')}: {problem}")
    return passed, failures


def check_case(case: dict[str, Any], batches: dict[str, Any], defaults: dict[str, Any]) -> str | None:
    """What is wrong with one case, or None."""
    matching = [name for name, candidate in FORMATS.items() if candidate.recognises(case)]
    if not matching:
        return f"unknown format with fields {sorted(case)}; known: {', '.join(FORMATS)}"
    if "batch" in case and case["batch"] not in batches:
        return f"batch {case['batch']!r} is not among the inputs {sorted(batches)}: pass --inputs"
    inputs = Inputs.of(batches[case["batch"]]) if "batch" in case else Inputs.of({"sequences": []})
    try:
        actual = FORMATS[matching[0]].run(case, inputs, defaults)
    except (KeyError, ValueError) as error:
        return f"{matching[0]}: {type(error).__name__}: {error}"
    return first_difference(case["expected"], actual)
