"""Tables in files. Nothing is read before it is needed, but for an index of lines."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slime_async.actors.data.rows import Columns, Rows, TableTasks


def table(
    path: str | Sequence[str],
    *,
    prompt: str = "prompt",
    answer: str = "",
    messages: str = "",
    system: str = "",
    template: str = "",
    chat: bool = True,
    split: str = "train",
    skip: int = 0,
    limit: int | None = None,
    max_characters: int | None = None,
) -> TableTasks:
    """Tasks from ``path``: a file, a pattern (``data/*.parquet``), a list of either, or the folder of a data set.

    Files whose names end in ``.parquet`` are Parquet, others have one JSON object per line; a folder is what
    ``datasets``' ``save_to_disk`` wrote, with ``split`` where it has several. ``Columns`` says what the names mean;
    ``skip`` and ``limit`` take a part of the rows, ``max_characters`` leaves out longer prompts.

    Raises ``ValueError`` when nothing matches, a column does not exist, or a package is missing.
    """
    columns = Columns(prompt, answer, messages, system, template, chat)
    return TableTasks(read(path, split), columns, skip=skip, limit=limit, max_characters=max_characters)


def read(path: str | Sequence[str], split: str = "train") -> Rows:
    """The table alone."""
    if isinstance(path, str) and Path(path).is_dir():
        return _load_from_disk(path, split)
    files = find(path)
    parquet = [file.suffix == ".parquet" for file in files]
    if any(parquet) and not all(parquet):
        raise ValueError(f"path = {path!r} names both Parquet and other files: make them two sources")
    return ParquetTable(files) if all(parquet) else JsonLinesTable(files)


def find(path: str | Sequence[str]) -> list[Path]:
    """All files that ``path`` names, each list entry's in the order of their names. Raises ``ValueError`` for none."""
    found: list[Path] = []
    for pattern in [path] if isinstance(path, str) else path:
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
        if not matches:
            raise ValueError(f"no file {pattern!r} (looked from {Path.cwd()}): check path, which is relative to there")
        found += matches
    return found


class JsonLinesTable:
    """Lines of several files, found by their offsets. A file is opened for each read: actors hold thousands of tasks,
    but no open files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._offsets = [_line_offsets(file) for file in files]
        self._ends = np.cumsum([len(offsets) for offsets in self._offsets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        line = index - int(self._ends[number] - len(self._offsets[number]))
        with self._files[number].open("rb") as file:
            file.seek(int(self._offsets[number][line]))
            text = file.readline()
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._files[number]}, row {line}: {error}: {text[:80]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self._files[number]}, row {line} is a {type(row).__name__}: each line is one object")
        return row


class ParquetTable:
    """Row groups of several files; the last one read is kept, others are read again when they are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise ValueError("Parquet needs pyarrow: pip install 'slime-async[data]'") from error
        self._files = [pyarrow.parquet.ParquetFile(file) for file in files]
        groups = [(file, group) for file in self._files for group in range(file.num_row_groups)]
        self._groups = groups
        self._ends = np.cumsum([file.metadata.row_group(group).num_rows for file, group in groups], dtype=np.int64)
        self._held = -1
        self._table: Any = None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number != self._held:
            file, group = self._groups[number]
            self._table, self._held = file.read_row_group(group), number
        row = self._table.slice(index - int(self._ends[number] - self._table.num_rows), 1).to_pylist()[0]
        return dict(row)


def _load_from_disk(path: str, split: str) -> Rows:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError("Hugging Face datasets need datasets: pip install 'slime-async[data]'") from error
    try:
        loaded = datasets.load_from_disk(path)
    except FileNotFoundError as error:
        raise ValueError(f"path = {path!r} holds no dataset that save_to_disk wrote: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"split = {split!r}: {path} has {sorted(loaded)}")
        loaded = loaded[split]
    return loaded  # type: ignore[no-any-return]  # a Dataset: len() and [index] → row


def _line_offsets(path: Path) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where each line that is not blank begins."""
    offsets, position = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                offsets.append(position)
            position += len(line)
    return np.array(offsets, dtype=np.int64)
