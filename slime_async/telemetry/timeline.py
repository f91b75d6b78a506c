"""``RUN/timeline.json``: every process's spans on one time line, for https://ui.perfetto.dev or ``chrome://tracing``.

The format is Chrome's trace events: one trace process per process of the run, in it a lane (a "thread") each for

========  ==============================================================================================
activity  what the process's time counts as (``slime_async.telemetry.accounting``): disjoint, without holes
loop      learner: lease, train with its phases, commit, snapshot, evaluation, …
publish   learner: each publication with prepare_sync, join, convert, pause, broadcast, resume
engine    actor: computing
weights   actor: paused for new weights
episodes  actor: any episode open; likewise ``delivery`` and ``idle``
gate      hub: admission closed, by its cause
========  ==============================================================================================

besides the trace process ``run`` with its phases and events, and counters of the queue at the hub. Times are the
hub's, in microseconds since the first span.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slime_async.telemetry.accounting import COMPUTING, PRECEDENCE, gate_spans, pieces
from slime_async.telemetry.jsonl import Problem, read_jsonl
from slime_async.telemetry.overlap import rl_phase
from slime_async.telemetry.spans import Span, Track, read_tracks

Event = dict[str, Any]

RUN_PID = 1
LANES_PER_PROCESS = 100
ACTIVITY_LANE = "activity"
LANES: dict[str, tuple[str, ...]] = {
    "publish": ("publish", "prepare_sync", "join", "convert", "pause", "broadcast", "resume"),
    "engine": ("generate",),
    "weights": ("weight_sync",),
    "episodes": ("episode",),
    "delivery": ("deliver",),
    "idle": ("idle",),
    "gate": ("gate",),
}
"""Spans of one lane nest; whatever is not named here is in ``loop``"""
COUNTERS = ("held", "pacing", "running")
"""Of ``queue.jsonl``"""
_LANE_OF = {name: lane for lane, names in LANES.items() for name in names}
_LANE_ORDER = (ACTIVITY_LANE, "loop", *LANES)


def write_timeline(run: Path, path: Path | None = None, problem: Problem | None = None) -> Path:
    """Write a run's timeline, whole or not at all, to ``RUN/timeline.json`` or ``path``; returns where it is."""
    path = path or run / "timeline.json"
    tracks = read_tracks(run / "spans", problem)
    events = trace_events(tracks, read_jsonl(run / "queue.jsonl", problem), read_jsonl(run / "events.jsonl", problem))
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps({"run": run.resolve().name}))
        file.write(',"traceEvents":[\n')
        for number, event in enumerate(events):
            file.write((",\n" if number else "") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")
    temporary.replace(path)
    return path


def trace_events(tracks: Sequence[Track], queue: Iterable[Event] = (), events: Iterable[Event] = ()) -> Iterator[Event]:
    """Chrome trace events, one by one; none without any span."""
    starts = [span.start_ns for track in tracks for span in track.spans]
    if not starts:
        return
    origin = min(starts)
    yield from _named_process(RUN_PID, "run", ["phases"])
    phase = rl_phase([span for track in tracks for span in track.spans])
    if phase is not None:
        yield _slice(RUN_PID, _tid(RUN_PID, 1), "rl", "phase", phase[0], phase[1], origin, {})
    for event in events:
        if "time_s" in event and (at := _us(round(event["time_s"] * 1e9), origin)) >= 0:
            args = {name: value for name, value in event.items() if name not in ("time_s", "event")}
            name = str(event.get("event"))
            yield {"ph": "i", "s": "p", "name": name, "pid": RUN_PID, "tid": _tid(RUN_PID, 1), "ts": at, "args": args}
    gate = gate_spans(tracks)
    for pid, track in enumerate(tracks, RUN_PID + 1):
        yield from _process(pid, track, gate, origin)
        if track.role == "hub":
            yield from _counters(pid, queue, origin)


def _process(pid: int, track: Track, gate: Sequence[Span], origin: int) -> Iterator[Event]:
    cut = pieces(track, gate) if track.role in PRECEDENCE else []
    lanes = {_LANE_OF.get(span.name, "loop") for span in track.spans} | ({ACTIVITY_LANE} if cut else set())
    order = [lane for lane in _LANE_ORDER if lane in lanes]
    yield from _named_process(pid, track.process, order)
    for start, end, part in cut:
        kind = COMPUTING if part == COMPUTING else "waiting"
        yield _slice(pid, _tid(pid, 1), part, kind, start, end, origin, {})
    for span in track.spans:
        lane = _LANE_OF.get(span.name, "loop")
        name = f"closed: {span.args.get('cause')}" if span.name == "gate" else span.name
        yield _slice(
            pid, _tid(pid, order.index(lane) + 1), name, lane, span.start_ns, span.end_ns, origin, dict(span.args)
        )


def _counters(pid: int, queue: Iterable[Event], origin: int) -> Iterator[Event]:
    for line in queue:
        if "time_s" in line and (at := _us(round(line["time_s"] * 1e9), origin)) >= 0:
            for name in COUNTERS:
                if name in line:
                    yield {"ph": "C", "name": f"queue: {name}", "pid": pid, "ts": at, "args": {name: line[name]}}


def _named_process(pid: int, name: str, lanes: Sequence[str]) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    for number, lane in enumerate(lanes, 1):
        tid = _tid(pid, number)
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": number}}


def _slice(
    pid: int, tid: int, name: str, category: str, start_ns: int, end_ns: int, origin: int, args: dict[str, Any]
) -> Event:
    """A complete event. Its end is rounded as its start is, so that what touches, touches in the trace."""
    start, end = _us(start_ns, origin), _us(end_ns, origin)
    event = {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": round(end - start, 3),
    }
    return event | ({"args": args} if args else {})


def _tid(pid: int, lane: int) -> int:
    """Unique in the whole trace: some readers take thread ids for the machine's."""
    return LANES_PER_PROCESS * pid + lane


def _us(time_ns: int, origin: int) -> float:
    """Microseconds since the first span: small numbers, in which a float keeps nanoseconds for three months."""
    return (time_ns - origin) / 1000
