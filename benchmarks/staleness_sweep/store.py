"""Finished cells as small files: a sweep that is stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.staleness_sweep.cells import Cell, Protocol
from benchmarks.staleness_sweep.training import CellResult


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


class Store:
    """One directory: ``protocol.json`` and a file per finished cell."""

    def __init__(self, directory: Path, protocol: Protocol) -> None:
        """Raises ``ValueError`` when the directory holds cells of another protocol."""
        self.directory = directory
        file = directory / "protocol.json"
        if not file.exists():
            write_json(file, protocol.as_dict())
        known = json.loads(file.read_text(encoding="utf-8"))
        if known != protocol.as_dict():
            wanted = protocol.as_dict()
            differing = {name: (known.get(name), wanted[name]) for name in wanted if known.get(name) != wanted[name]}
            raise ValueError(
                f"{directory} holds cells of another protocol (there, here): {differing}; choose another --directory"
            )

    def _path(self, cell: Cell) -> Path:
        return self.directory / "cells" / f"{cell.name}.json"

    def has(self, cell: Cell) -> bool:
        return self._path(cell).exists()

    def save(self, cell: Cell, result: CellResult) -> None:
        write_json(self._path(cell), {"cell": cell._asdict(), "result": dataclasses.asdict(result)})

    def load(self) -> dict[Cell, CellResult]:
        """Every finished cell, by name."""
        results = {}
        for path in sorted((self.directory / "cells").glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            result = CellResult(**content["result"])
            result.curve = [(int(step), float(accuracy)) for step, accuracy in result.curve]
            results[Cell(**content["cell"])] = result
        return results
