"""README and docs/ as text: their commands, links and what they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = ("bash", "sh", "console")


@dataclass(frozen=True, slots=True)
class Command:
    """One line that a reader is told to type."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands() -> list[Command]:
    """In order; each text once."""
    found = {text: Command(page.name, text) for page in reversed(PAGES) for text in reversed(list(_commands(page)))}
    return list(reversed(found.values()))


def _commands(page: Path) -> Iterator[str]:
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in SHELLS:
            continue
        for line in body.splitlines():
            if language == "console" and not line.startswith("$ "):
                continue  # what it prints
            if text := re.sub(r"(^|\s+)#.*$", "", line.removeprefix("$ ")).strip():
                yield re.sub(r"\s+", " ", text)


def prose(page: Path) -> str:
    """Without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))
