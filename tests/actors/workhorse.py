"""Functions and objects that tests run in worker processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def add(a: float, b: float = 0.0) -> float:
    return a + b


def echo(value: Any) -> Any:
    return value


def fail(message: str) -> None:
    raise ValueError(message)


def hang() -> None:
    while True:
        time.sleep(60)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def eat(num_bytes: int) -> int:
    return len(bytearray(num_bytes))


def whoami() -> int:
    return os.getpid()


def complain() -> str:
    sys.stdout.write("this goes to the log, not into the pipe\n")
    return "done"


def something() -> object:
    return object()


def judge(content: Any, answer: str, finish_reason: str) -> float:
    return float(answer == content["wanted"])


def source() -> list[dict[str, str]]:
    return [{"prompt": "1", "wanted": "12"}, {"prompt": "2", "wanted": "21"}]


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    def step(self, by: int = 1) -> dict[str, int]:
        self.value += by
        return {"value": self.value, "process": os.getpid()}

    def hang(self) -> None:
        hang()
