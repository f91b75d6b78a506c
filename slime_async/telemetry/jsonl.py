"""JSON Lines that survive ``kill -9``: every line is one write to the file, complete or absent, never buffered.

One write of a few hundred bytes costs microseconds. Files are opened to append, so several processes of one machine
may write the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """An open file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises ``ValueError`` after ``close``."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if it is absent.

    A last line without its end (power loss, full disk) is left out; any other bad line is a ``ValueError``.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and os.fstat(file.fileno()).st_size == file.tell():
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
