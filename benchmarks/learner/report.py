"""Lines of the table, and the figures that are quoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = f"{'cell':58}{'tokens/s':>10}{'MFU':>8}{'step s':>8}{'peak GB':>9}{'wall s':>8}"
HEADLINE_SEQUENCE = 2048


def check_line(check: dict[str, Any]) -> str:
    if "name" not in check:
        return f"checks: {check}"
    verdict = "ok" if check["passed"] else "WRONG"
    return f"{verdict:6}{check['name']:44}error {check['error']:.2e}, plain {check['plain_error']:.2e}"


def row_line(row: dict[str, Any]) -> str:
    if "tokens_per_s" not in row:
        reason = row.get("out_of_memory") or row.get("failed", "")
        return f"{row['name']:58}{'out of memory: ' * ('out_of_memory' in row)}{reason.strip()[-400:]}"
    memory = row["peak_memory_gb"]
    peak = f"{memory:9.1f}" if memory is not None else f"{'':9}"
    numbers = f"{row['tokens_per_s']:10.0f}{row['mfu']:8.1%}{row['step_s']:8.2f}{peak}{row['wall_s']:8.1f}"
    failed = f"\n    afterwards: {row['failed'].strip()[-400:]}" if "failed" in row else ""
    return f"{row['name']:58}{numbers}{failed}{profile_lines(row)}"


def profile_lines(row: dict[str, Any]) -> str:
    if "time" not in row:
        return ""
    profile = row["time"]
    lines = [f"\n    idle {profile['idle_share']:.1%} of {profile['step_ms']:.0f} ms under the profiler"]
    lines += [f"    {k['ms']:9.1f} ms {k['share_of_busy']:6.1%}  {k['kind']}" for k in profile["kinds"]]
    lines += [f"    {k['ms']:9.1f} ms {k['calls']:6d} x {k['kernel'][:110]}" for k in profile["top"][:16]]
    lines += [f"    host waits: {place}" for place in row["synchronisations"][:12]]
    return "\n".join(lines)


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the best cells with sequences of 2,048 tokens."""
    found: dict[str, float] = {}
    for shape, label in (("4b", "4b"), ("1.7b", "1_7b"), ("0.6b", "0_6b")):
        best, rival = (_best(rows, shape, trainer) for trainer in ("slime_async", "transformers"))
        if best is not None:
            found[f"mfu_{label}"] = best["mfu"]
            found[f"tokens_per_s_{label}"] = best["tokens_per_s"]
            found[f"peak_memory_gb_{label}"] = best["peak_memory_gb"]
        if best is not None and rival is not None:
            found[f"tokens_per_s_over_transformers_{label}"] = best["tokens_per_s"] / rival["tokens_per_s"]
    if "tokens_per_s_over_transformers_4b" in found:
        found["tokens_per_s_over_transformers"] = found["tokens_per_s_over_transformers_4b"]
    if "peak_memory_gb_4b" in found:
        found["peak_memory_gb"] = found["peak_memory_gb_4b"]
    return found


def _best(rows: Sequence[dict[str, Any]], shape: str, trainer: str) -> dict[str, Any] | None:
    measured = [
        row
        for row in rows
        if (row["shape"], row["trainer"], row["sequence"]) == (shape, trainer, HEADLINE_SEQUENCE)
        and "tokens_per_s" in row
    ]
    return max(measured, key=lambda row: row["tokens_per_s"], default=None)
