"""Formats of reference cases, and the runner of each.

A case's format is told by its own fields, never by its id or its file's name. A runner takes ``(case, inputs,
defaults)`` and returns every value that the case expects, by name; where a case has no ``expected``, its format says
what it expects. To add a format, add a row to ``FORMATS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from reference_formats import areal, slime, staleness, verl
from reference_formats.compare import first_difference
from reference_formats.inputs import Inputs

INPUTS = "inputs.json"
"""Where batches are unless a file says otherwise"""

Case = dict[str, Any]
Runner = Callable[[Case, Inputs, dict[str, Any]], dict[str, Any]]


class Format(NamedTuple):
    recognises: Callable[[Case], bool]
    run: Runner
    expected: Callable[[Case], dict[str, Any]] = lambda case: case["expected"]


def _has(*fields: str) -> Callable[[Case], bool]:
    return lambda case: all(field in case for field in fields)


def _kind(kind: str) -> Callable[[Case], bool]:
    return lambda case: case.get("kind") == kind


FORMATS: dict[str, Format] = {
    "areal decoupled PPO": Format(_has("ppo"), areal.decoupled_ppo),
    "verl importance weights": Format(_kind("is_weights"), verl.importance_weights),
    "verl rejection mask": Format(_kind("rs_mask"), verl.rejection),
    "verl off-policy metrics": Format(_kind("offpolicy_metrics"), verl.off_policy_metrics),
    "verl policy loss": Format(_has("loss", "loss_agg_mode"), verl.policy_loss),
    "slime OPSM": Format(_kind("opsm"), slime.off_policy_sequence_mask),
    "slime policy loss": Format(_has("estimator", "correction"), slime.policy_loss),
    "areal admission": Format(_has(staleness.TRACE), staleness.admission, staleness.admission_expected),
    "staleness closed form": Format(_has("formula", "M_tail"), staleness.closed_form, lambda case: case["formula"]),
}


def check_files(files: Iterable[Path], inputs_path: Path | None = None) -> tuple[int, list[str]]:
    """How many cases passed, and one line per failure; a file that cannot be read is one failure."""
    passed, failures = 0, []
    for path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cases, batches = content["cases"], _batches(path, content, inputs_path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            failures.append(f"FAILED {path.name}: not a file of reference cases: {type(error).__name__}: {error}")
            continue
        for number, case in enumerate(cases):
            problem = check_case(case, batches, content.get("defaults") or {})
            if problem is None:
                passed += 1
            else:
                failures.append(f"FAILED {path.name}: {case.get('id', f'case {number}')}: {problem}")
    return passed, failures


def _batches(path: Path, content: dict[str, Any], inputs_path: Path | None) -> dict[str, Any]:
    """The batches that the cases name: --inputs, else the file's own, else those of the file that it names."""
    if inputs_path is None and "batches" in content:
        return dict(content["batches"])
    named = str(content.get("inputs") or INPUTS).split()[0]
    for candidate in (inputs_path,) if inputs_path else (path.with_name(named), path.with_name(INPUTS)):
        if inputs_path or candidate.is_file():
            return dict(json.loads(candidate.read_text(encoding="utf-8"))["batches"])
    return {}


def check_case(case: Case, batches: dict[str, Any], defaults: dict[str, Any]) -> str | None:
    """What is wrong with one case, or None."""
    matching = [name for name, candidate in FORMATS.items() if candidate.recognises(case)]
    if not matching:
        return f"unknown format with fields {sorted(case)}; known: {', '.join(FORMATS)}"
    if "batch" in case and case["batch"] not in batches:
        return f"batch {case['batch']!r} is not among the inputs {sorted(batches)}: pass --inputs"
    inputs = Inputs.of(batches[case["batch"]]) if "batch" in case else Inputs.of({"sequences": []})
    chosen = FORMATS[matching[0]]
    try:
        return first_difference(chosen.expected(case), chosen.run(case, inputs, defaults))
    except (KeyError, ValueError, TypeError) as error:
        return f"{matching[0]}: {type(error).__name__}: {error}"
