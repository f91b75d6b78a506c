"""Log lines of a role's process: text for people, or JSON Lines for a log collector (``loggers.format = "json"``)."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

from slime_async import __version__
from slime_async.telemetry.process import Process

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, role, process, host, version; exception if any."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "role": self._process.role,
            "process": self._process.name,
            "host": self._process.host,
            "version": __version__,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class WarningCounter(logging.Handler):
    """Tells the process of every warning."""

    def __init__(self, process: Process) -> None:
        super().__init__(logging.WARNING)
        self._process = process

    def emit(self, record: logging.LogRecord) -> None:
        self._process.warned(record.getMessage())


def log_to_stderr(process: Process, log_format: LogFormat) -> None:
    """All loggers of this process, from INFO on."""
    handler = logging.StreamHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {process.name} %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler, WarningCounter(process)])
