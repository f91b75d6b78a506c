"""Reading what processes wrote."""

from __future__ import annotations

from pathlib import Path


def log_tail(log: Path, lines: int = 20, limit_bytes: int = 16384) -> str:
    """The last lines of a log, however long it is; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - limit_bytes))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
