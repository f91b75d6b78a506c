#!/usr/bin/env python3
"""Writes the reference pages that follow from the code: docs/configuration.md and docs/metrics.md.

scripts/generate_docs.py            write them
scripts/generate_docs.py --check    write nothing; exit code 1 when one is not current
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slime_async.config import Config  # noqa: E402
from slime_async.config.fields import PASS_THROUGH, Field, fields, sections  # noqa: E402
from slime_async.config.schema import SourceConfig  # noqa: E402
from slime_async.telemetry import accounting, families, spans  # noqa: E402
from slime_async.telemetry.metrics import FAMILIES, METRICS, Metric  # noqa: E402
from slime_async.telemetry.summary import Summary  # noqa: E402
from slime_async.transport.observer import SAMPLED  # noqa: E402

GENERATED = "<!-- Written by scripts/generate_docs.py from the code: change it there. -->\n"


def configuration() -> str:
    """Every key, from the schema and its docstrings."""
    parts = [
        GENERATED,
        "# Configuration\n",
        "One TOML file; every key is also a flag (`[staleness] max_staleness` is `--staleness.max-staleness`), and a "
        "misspelt key is an error that names the nearest. What a run used is in its `config.toml`, complete.\n",
    ]
    defaults, by_section = Config(), {name: list[Field]() for name in sections()}
    for field in fields():
        if field.section:
            by_section[field.section].append(field)
    for name, section in sections().items():
        parts.append(f"## `[{name}]`\n\n{_sentence(section.__doc__)}\n")
        rows = [_field_row(field, getattr(getattr(defaults, name), field.name)) for field in by_section[name]]
        parts.append(_table(("key", "values", "default", "meaning"), rows))
        if name == "task":
            parts.append("Each source, `[task.train.NAME]` or `[task.evaluation.NAME]`:\n")
            parts.append(_table(("key", "default", "meaning"), _source_rows()))
    for field in fields():
        if field.name in PASS_THROUGH:
            flag = f"`--{field.name}-NAME`"
            parts.append(f"## `[{field.name}]`\n\n{_sentence(field.info.description)}; as flags, {flag}.\n")
    return "\n".join(parts)


def metrics() -> str:
    """Every number that a run writes, and what its time counts as."""
    parts = [
        GENERATED,
        "# Metrics\n",
        "`metrics.jsonl` has a line per step: `step` (the version trained from, counting from 0), `phase`, `time_s` "
        "(Unix time) and the numbers below. TensorBoard and W&B get them under the same names.\n",
        "## Of a step\n",
        _metric_table(METRICS),
        "## Families\n",
        _table(("begins with", "are"), [(f"`{name}`", text) for name, text in FAMILIES.items()]),
        _sentence(families.__doc__) + "\n",
        _metric_table(families.FAMILY_METRICS),
        "## Idle accounting\n",
        _sentence((accounting.__doc__ or "").partition("=====")[0]) + "\n",
        *_ruled_tables(accounting.__doc__ or ""),
        "Both have `unaccounted`, what no span covers: below 1% where nothing is wrong. A side's account is the sum "
        "over its processes, from each one's first span to its last; `summary.json` has the fractions while RL ran.\n",
        "## Spans\n",
        "`spans/PROCESS.jsonl` has a line per span, `timeline.json` all of them for Perfetto.\n",
        *_ruled_tables(spans.__doc__ or ""),
        "## The queue over time\n",
        "`queue.jsonl` has a line per heartbeat of the hub: `time_s` and\n",
        _table(("name", "meaning"), [(f"`{name}`", text) for name, text in SAMPLED.items()]),
        "## The summary\n",
        "`summary.json` has the run in a handful of numbers; null is what was not measured.\n",
        _table(("name", "meaning"), [(f"`{n}`", text) for n, text in _field_docs(Summary)]),
    ]
    return "\n".join(parts)


PAGES = {"docs/configuration.md": configuration, "docs/metrics.md": metrics}


def _field_row(field: Field, default: Any) -> tuple[str, ...]:
    text = field.info.description or ""
    limits = [str(limit) for limit in field.info.metadata]
    values = f"`{field.kind}`".replace("|", "\\|") + (f" {', '.join(limits)}" if limits else "")
    return f"`{field.name}`", _limits(values), _default(default), _sentence(text)


def _limits(values: str) -> str:
    """``Gt(gt=0)`` → ``> 0``."""
    for name, sign in (("Ge(ge=", "≥ "), ("Gt(gt=", "> "), ("Le(le=", "≤ "), ("Lt(lt=", "< ")):
        while name in values:
            before, _, rest = values.partition(name)
            number, _, after = rest.partition(")")
            values = f"{before}{sign}{number}{after}"
    return values


def _default(value: Any) -> str:
    if value is None or value == "" or value == {}:
        return "not set"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _source_rows() -> list[tuple[str, ...]]:
    return [
        (
            f"`{name}`",
            "required" if info.is_required() else _default(info.get_default(call_default_factory=True)),
            _sentence(info.description),
        )
        for name, info in SourceConfig.model_fields.items()
    ]


def _metric_table(documented: dict[str, Metric]) -> str:
    rows = [
        (f"`{name}`", m.unit or "–", _sentence(m.definition), _sentence(m.remedy)) for name, m in documented.items()
    ]
    return _table(("name", "unit", "definition", "when it is bad"), rows)


def _field_docs(cls: type) -> list[tuple[str, str]]:
    """Fields of a dataclass with the docstrings below them, from its source."""
    [body] = [node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef)]
    found: list[tuple[str, str]] = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append((node.target.id, ""))
        elif found and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[-1] = (found[-1][0], _sentence(str(node.value.value)))
    return found


def _ruled_tables(docstring: str) -> list[str]:
    """The tables of a docstring, ruled with ``====``; a line whose first column is empty continues the one above."""
    lines, tables = inspect.cleandoc(docstring).splitlines(), list[str]()
    rulers = [i for i, line in enumerate(lines) if line.startswith("====")]
    for top, middle, bottom in zip(rulers[::3], rulers[1::3], rulers[2::3], strict=True):
        starts = [i for i, c in enumerate(lines[top]) if c == "=" and (i == 0 or lines[top][i - 1] == " ")]
        rows: list[list[str]] = []
        for line in lines[middle + 1 : bottom]:
            cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            if cells[0]:
                rows.append(cells)
            else:
                rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        heads = [lines[top + 1][a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        tables.append(_table(heads, [[f"`{row[0]}`", *map(_sentence, row[1:])] for row in rows]))
    return tables


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _sentence(text: str | None) -> str:
    """On one line, with reStructuredText's double backticks as Markdown's single ones."""
    return " ".join((text or "").split()).replace("``", "`").replace(" | ", " \\| ")


def main(arguments: Sequence[str]) -> int:
    """Write or check; returns the exit code."""
    stale = [name for name, page in PAGES.items() if not _is_current(ROOT / name, page())]
    if "--check" not in arguments:
        for name in stale:
            (ROOT / name).write_text(PAGES[name](), encoding="utf-8")
            print(f"wrote {name}")
        return 0
    for name in stale:
        print(f"{name} is not current: run scripts/generate_docs.py", file=sys.stderr)
    return int(bool(stale))


def _is_current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
