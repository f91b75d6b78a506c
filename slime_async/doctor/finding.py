"""One thing that was looked at: how it is, and what to do when it is bad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``ok``: as it should be; ``warning``: works, but slower or less safely; ``error``: runs will fail."""

    level: Level
    subject: str
    text: str
    remedy: str = ""
    """What to do; never empty but for ``ok``"""

    def __post_init__(self) -> None:
        assert self.level == "ok" or self.remedy, f"{self.subject}: {self.text} has no remedy"


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, remedy: str) -> Finding:
    return Finding("warning", subject, text, remedy)


def error(subject: str, text: str, remedy: str) -> Finding:
    return Finding("error", subject, text, remedy)
