"""What every process did from when to when, one JSON line per span in ``RUN/spans/PROCESS.jsonl``.

Durations come from the monotonic clock; it is tied to wall time once per process, and to the hub's clock by what
``slime_async.telemetry.clocks`` measures, so that spans of several processes can be laid over each other.

=============  =========  ===================================================================================
span           role       from … to
=============  =========  ===================================================================================
starting       all        the process's start … an actor's first weights, the learner's model, the hub's socket
generate       actor      the engine computes tokens (any request runs, not paused); idle gaps end it
weight_sync    actor      pause of the engine … its resume
episode        actor      any episode is being played
deliver        actor      any trajectory is on its way to the hub
idle           actor      no episode and no delivery: nothing is granted
lease          learner    asking for a batch … having it
train          learner    everything from a batch to new weights; it holds the next four
prepare        learner    advantages and masks
prox           learner    log-probs of π_prox and π_ref
forward        learner    forward and backward of one optimizer step
optimizer      learner    the rest of the step
commit         learner    telling the hub that a batch is trained
snapshot       learner    converting the weights into buffers of their own
log            learner    writing the step's metrics
publish_stall  learner    the publication before is not done: the loop waits for it
wait_engines   learner    waiting for engines to hold a version
supervised     learner    the warm start, and its control
evaluate       learner    waiting for an evaluation
save           learner    writing a checkpoint
publish        learner    new weights are at hand … all engines use them; it holds the next six
prepare_sync   learner    until all engines acknowledge
join           learner    forming the weight group, where members changed
convert        learner    until there are converted weights to send
pause          learner    until no engine samples
broadcast      learner    the collective
resume         learner    until all engines sample again
gate           hub        admission is closed; ``cause`` says by what (``slime_async.queue.gate.GateCause``)
=============  =========  ===================================================================================

Work on accelerators is asynchronous: a span ends when the host goes on, which the learner does at every optimizer
step's gradient norm.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from slime_async.protocol import Scalar
from slime_async.telemetry.clocks import ClockSample, offset_at
from slime_async.telemetry.jsonl import JsonLines, Problem, read_jsonl

ProcessRole = Literal["actor", "learner", "hub"]

PIECE_NS = 10 * 10**9
"""A long stretch is written in pieces of about this length: who is killed loses no more"""


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of time; nanoseconds since the Unix epoch."""

    process: str
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Scalar]


class SpanRecorder:
    """Writes the spans of one process, each as soon as it ends. Threads may share it. Without a path, none are kept."""

    def __init__(self, path: Path | None, process_name: str, role: ProcessRole | None = None) -> None:
        self._process = process_name
        self._lines = JsonLines(path)
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        if role is not None:
            self._lines.write({"process": process_name, "role": role, "pid": os.getpid()})

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

    def started(self) -> None:
        """Record ``starting``: from the start of this process until now."""
        self.add("starting", process_start_ns(), time.monotonic_ns())

    def now_ns(self) -> int:
        """This process's idea of the time since the epoch, as its spans have it."""
        return time.monotonic_ns() + self._epoch_ns

    def align(self, sample: ClockSample) -> None:
        """Record how far this process's clock is from the hub's; of several, readers interpolate."""
        clock = {"at_ns": sample.at_ns, "offset_ns": sample.offset_ns, "error_ns": sample.error_ns}
        self._lines.write({"process": self._process, "clock": clock})

    def close(self) -> None:
        self._lines.close()


def process_start_ns() -> int:
    """When this process began, by ``time.monotonic_ns()``; to a hundredth of a second on Linux, elsewhere: now."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began_ns = int(fields[19]) * 10**9 // os.sysconf("SC_CLK_TCK")
        age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - began_ns
    except (OSError, ValueError, IndexError, AttributeError):
        age_ns = 0
    return time.monotonic_ns() - max(0, age_ns)


@dataclass(slots=True)
class Track:
    """One process of a run."""

    process: str
    role: ProcessRole
    spans: list[Span] = field(default_factory=list)
    """By start"""
    clock: ClockSample | None = None
    """The last measurement, if there was one"""

    def named(self, *names: str) -> list[tuple[int, int]]:
        """The intervals of some spans."""
        return [(span.start_ns, span.end_ns) for span in self.spans if span.name in names]


def read_tracks(directory: Path, problem: Problem | None = None, tail_bytes: int | None = None) -> list[Track]:
    """Every process of a run that has recorded anything, by name. The rest as in ``read_jsonl``."""
    paths = sorted(directory.glob("*.jsonl"))
    return [track for path in paths if (track := _read(path, problem, tail_bytes)).spans]


def read_spans(directory: Path) -> list[Span]:
    """All spans of a run, by start."""
    spans = [span for track in read_tracks(directory) for span in track.spans]
    return sorted(spans, key=lambda span: (span.start_ns, span.end_ns))


def _read(path: Path, problem: Problem | None, tail_bytes: int | None) -> Track:
    track = Track(path.stem, _guessed_role(path.stem))
    spans: list[dict[str, Any]] = []
    samples: list[ClockSample] = []
    for line in read_jsonl(path, problem, tail_bytes):
        if "clock" in line:
            samples.append(ClockSample(**line["clock"]))
        elif "role" in line:
            track.role = cast(ProcessRole, line["role"])
        elif "start_ns" in line:
            spans.append(line)
    samples.sort(key=lambda sample: sample.at_ns)
    track.clock = samples[-1] if samples else None
    for line in spans:
        track.process = line["process"]
        start, end = (
            at + offset_at(samples, at) for at in (line["start_ns"], line["end_ns"])
        )  # what nests, still does
        track.spans.append(Span(line["process"], line["name"], start, end, line["args"]))
    track.spans.sort(key=lambda span: (span.start_ns, span.end_ns))
    return track


def _guessed_role(name: str) -> ProcessRole:
    """For files without their first line."""
    if name.startswith("learner"):
        return "learner"
    return "hub" if name == "hub" else "actor"
