"""Log lines for collectors, and what a process tells of itself."""

from __future__ import annotations

import json
import logging

from slime_async import __version__
from slime_async.telemetry.logs import JsonFormatter, WarningCounter
from slime_async.telemetry.process import Process


def record(message: str, level: int = logging.INFO, **more: object) -> logging.LogRecord:
    return logging.LogRecord("some.logger", level, "file.py", 1, message, ("x",), None, **more)  # type: ignore[arg-type]


def test_a_json_line_says_who_and_where() -> None:
    process = Process(host="node-7")
    process.begin("actor", "actor-3")
    line = json.loads(JsonFormatter(process).format(record("said %s")))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "some.logger",
        "message": "said x",
        "role": "actor",
        "process": "actor-3",
        "host": "node-7",
        "version": __version__,
    }


def test_an_exception_stays_within_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        failed = record("%s")
        failed.exc_info = (type(error), error, error.__traceback__)
    text = JsonFormatter(Process()).format(failed)
    assert "\n" not in text
    assert "ValueError: two\nlines" in json.loads(text)["exception"]


def test_the_last_warning_goes_with_what_a_process_tells_of_itself() -> None:
    process = Process(host="node-7")
    assert process.about() == {}
    process.begin("hub", "hub")
    WarningCounter(process).emit(record("beware of %s", logging.WARNING))
    about = process.about()
    assert (about["host"], about["warnings"], about["last_warning"]) == ("node-7", 1, "beware of x")
