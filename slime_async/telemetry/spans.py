"""Busy time: what a process did from when to when, one JSON line per span in ``RUN/spans/PROCESS.jsonl``.

Durations come from the monotonic clock; it is tied to wall time once per process, so that spans of several processes
can be laid over each other. Names that the overlap is computed from:

==========  ========  =====================================================================
span        process   from … to
==========  ========  =====================================================================
generate    actors    the engine computes tokens (any request runs, not paused); idle gaps end it
lease       learner   asking for a batch … having it
train       learner   forward, backward and optimizer of one batch
publish     learner   new weights' conversion … all engines use them
commit      learner   telling the hub that a batch is trained
==========  ========  =====================================================================
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slime_async.protocol import Scalar
from slime_async.telemetry.jsonl import JsonLines, read_jsonl


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of busy time; nanoseconds since the Unix epoch."""

    process: str
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Scalar]


class SpanRecorder:
    """Writes the spans of one process, each as soon as it ends. Threads may share it."""

    def __init__(self, path: Path, process_name: str) -> None:
        self._process = process_name
        self._lines = JsonLines(path)
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    @contextmanager
    def span(self, name: str, **args: Scalar) -> Iterator[None]:
        """Record the time spent inside, also when it ends with an exception."""
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.add(name, start_ns, time.monotonic_ns(), **args)

    def add(self, name: str, start_ns: int, end_ns: int, **args: Scalar) -> None:
        """Record a span that was measured with ``time.monotonic_ns()``."""
        if end_ns < start_ns:
            raise ValueError(f"span {name!r} ends {start_ns - end_ns} ns before it starts")
        start, end = start_ns + self._epoch_ns, end_ns + self._epoch_ns
        self._lines.write({"process": self._process, "name": name, "start_ns": start, "end_ns": end, "args": args})

    def close(self) -> None:
        self._lines.close()


def read_spans(directory: Path) -> list[Span]:
    """All spans of a run, by start."""
    spans = [Span(**line) for path in sorted(directory.glob("*.jsonl")) for line in read_jsonl(path)]
    return sorted(spans, key=lambda span: (span.start_ns, span.end_ns))
