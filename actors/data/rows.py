"""Rows of a table as tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Rows(Protocol):
    """A table, read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what, and how a prompt is made of them.

    ``messages`` names a column that holds a conversation; otherwise ``prompt`` names one that holds text, and
    ``template`` is put around it ("{question} Think step by step.": any column by its name).
    """

    prompt: str
    answer: str
    messages: str
    system: str
    template: str
    chat: bool

    def content(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The task of one row. Raises ``ValueError`` for a column that it does not have."""
        made: dict[str, Any] = {"row": dict(row)}
        if self.answer:
            made["answer"] = self._column(row, self.answer)
        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.messages:
            return {**made, "messages": [*system, *map(dict, self._column(row, self.messages))]}
        text = self._text(row)
        if not self.chat:
            return {**made, "prompt": f"{self.system}\n{text}" if self.system else text}
        return {**made, "messages": [*system, {"role": "user", "content": text}]}

    def _text(self, row: Mapping[str, Any]) -> str:
        if not self.template:
            return str(self._column(row, self.prompt))
        try:
            return self.template.format_map(row)
        except KeyError as missing:
            raise ValueError(f"template {self.template!r} names {missing}, rows have {sorted(row)}") from None

    @staticmethod
    def _column(row: Mapping[str, Any], name: str) -> Any:
        if name not in row:
            raise ValueError(f"a row has no column {name!r}, only {sorted(row)}: name the right one in arguments")
        return row[name]


class TableTasks:
    """A sequence of tasks: the rows from ``skip`` on, at most ``limit``, without those whose text is too long.

    What is left out is decided once, from the rows alone, so that it is the same in every process.
    """

    def __init__(
        self, rows: Rows, columns: Columns, *, skip: int, limit: int | None, max_characters: int | None
    ) -> None:
        end = len(rows) if limit is None else min(len(rows), skip + limit)
        kept: Sequence[int] = range(skip, end)
        if max_characters is not None:
            kept = [i for i in kept if _length(columns.content(rows[i])) <= max_characters]
        if not kept:
            raise ValueError(
                f"no row is left of {len(rows)}: skip = {skip}, limit = {limit}, max_characters = {max_characters}"
            )
        columns.content(rows[kept[0]])  # a wrong name is told now, and not by the first episode
        self._rows, self._columns, self._kept = rows, columns, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self._kept):
            raise IndexError(f"task {index} of {len(self._kept)}")
        return self._columns.content(self._rows[self._kept[index]])


def _length(content: Mapping[str, Any]) -> int:
    if "prompt" in content:
        return len(content["prompt"])
    return sum(len(str(message["content"])) for message in content["messages"])
