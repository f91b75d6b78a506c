"""JSON Lines that survive ``kill -9``: every line is one write to the file, complete or absent, never buffered.

One write of a few hundred bytes costs microseconds. Files are opened to append, so several processes of one machine
may write the same file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Problem = Callable[[str], None]
"""Called with what could not be read"""


class JsonLines:
    """An open file of JSON objects, one per line; without a path, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if path is None else path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. Raises ``ValueError`` after ``close``."""
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_jsonl(path: Path, problem: Problem | None = None, tail_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if it is absent; with ``tail_bytes`` those that begin in so many last bytes.

    A last line without its end (power loss, full disk, a run in progress) is left out; any other bad line is a
    ``ValueError``, or, with ``problem``, told to it and skipped: what reports read.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        if tail_bytes is not None and (skipped := path.stat().st_size - tail_bytes) > 0:
            file.seek(skipped - 1)
            file.readline()
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                text = f"{path}, line {number} is not a JSON object: {error}"
                if problem is None:
                    raise ValueError(text) from None
                problem(text)
                continue
            yield record


class FollowedLines:
    """What is appended to a file of JSON objects, as it comes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Whole lines since the last call, none while there is no file; what is no JSON object is left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [record for line in whole.splitlines() if (record := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
