"""Our streams beside raw pyzmq, HTTP with JSON, and multiprocessing.Queue with pickle, on loopback.

    python -m benchmarks.transport [--seconds 1] [--repeats 9] [--out FILE]

Trajectories of 64 KiB, 1 MiB and 16 MiB from one process to another, each acknowledged; the ways take turns, slice by
slice, so that all of them meet the same neighbours. A figure "over" another is the median of the ratios of slices that
followed each other. CPU seconds are those of both processes, ZeroMQ's threads included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zmq

from benchmarks.transport_ways import (
    SPAWN,
    Slice,
    Way,
    make_keys,
    opened,
    receive_http,
    receive_ours,
    receive_queue,
    receive_raw,
    send_http,
    send_ours,
    send_queue,
    send_raw,
)

SIZES = {"64kib": 64 << 10, "1mib": 1 << 20, "16mib": 16 << 20}
FAST = ("ours", "raw", "ours, CURVE", "raw, CURVE")
SLOW = ("ours, CURVE ×4", "queue", "http")
"""Measured in fewer slices"""
SLOW_REPEATS = 3
WARM_UP_S = 0.3

Slices = dict[str, list[Slice]]


def open_ways(stack: ExitStack, keys: Path) -> dict[str, Way]:
    there, back = SPAWN.Queue(), SPAWN.Queue()
    return {
        "ours": stack.enter_context(opened(receive_ours, send_ours, None)),
        "raw": stack.enter_context(opened(receive_raw, send_raw, None)),
        "ours, CURVE": stack.enter_context(opened(receive_ours, send_ours, keys)),
        "raw, CURVE": stack.enter_context(opened(receive_raw, send_raw, keys)),
        "ours, CURVE ×4": stack.enter_context(opened(receive_ours, send_ours, keys, 4)),
        "queue": stack.enter_context(opened(receive_queue, send_queue, there, back)),
        "http": stack.enter_context(opened(receive_http, send_http)),
    }


def measure(ways: Mapping[str, Way], size_bytes: int, seconds: float, repeats: int) -> Slices:
    slices: Slices = {name: [] for name in ways}
    for name in FAST:
        ways[name].run(size_bytes, WARM_UP_S)
    for i in range(repeats):
        for name, way in ways.items():
            if i < (repeats if name in FAST else 1 if name == "http" else SLOW_REPEATS):
                slices[name].append(way.run(size_bytes, seconds))
    return slices


def per_s(one: Slice) -> float:
    return one.messages / one.seconds


def over(slices: Slices, upper: str, lower: str) -> float:
    """Median of the ratios of neighbouring slices."""
    pairs = zip(slices[upper], slices[lower], strict=False)
    return statistics.median(per_s(a) / per_s(b) for a, b in pairs)


def row(name: str, size: str, slices: Sequence[Slice]) -> dict[str, Any]:
    rate = statistics.median(map(per_s, slices))
    cpu_s_per_gb = sum(s.cpu_s for s in slices) / (sum(s.messages for s in slices) * SIZES[size] / 1e9)
    gbps = rate * SIZES[size] / 1e9
    return {"size": size, "way": name, "messages_per_s": rate, "gbps": gbps, "cpu_s_per_gb": cpu_s_per_gb}


def figures(measured: Mapping[str, Slices], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    by_cell = {(r["size"], r["way"]): r for r in rows}
    return {
        "gbps_over_raw_1mib": over(measured["1mib"], "ours", "raw"),
        "gbps_over_raw_16mib": over(measured["16mib"], "ours", "raw"),
        "messages_over_raw_64kib": over(measured["64kib"], "ours", "raw"),
        "messages_per_s_64kib": by_cell["64kib", "ours"]["messages_per_s"],
        "gbps_1mib": by_cell["1mib", "ours"]["gbps"],
        "gbps_16mib": by_cell["16mib", "ours"]["gbps"],
        "curve_gbps": by_cell["1mib", "ours, CURVE"]["gbps"],
        "curve_gbps_4_connections": by_cell["1mib", "ours, CURVE ×4"]["gbps"],
        "curve_over_raw_curve_1mib": over(measured["1mib"], "ours, CURVE", "raw, CURVE"),
        "cpu_s_per_gb_1mib": by_cell["1mib", "ours"]["cpu_s_per_gb"],
        "raw_cpu_s_per_gb_1mib": by_cell["1mib", "raw"]["cpu_s_per_gb"],
        "curve_cpu_s_per_gb_1mib": by_cell["1mib", "ours, CURVE"]["cpu_s_per_gb"],
        "over_queue_64kib": over(measured["64kib"], "ours", "queue"),
        "over_queue_1mib": over(measured["1mib"], "ours", "queue"),
        "over_http_64kib": over(measured["64kib"], "ours", "http"),
        "over_http_1mib": over(measured["1mib"], "ours", "http"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one slice")
    parser.add_argument("--repeats", type=int, default=9, help="slices of each fast way and size")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "transport.json")
    parsed = parser.parse_args(arguments)
    measured: dict[str, Slices] = {}
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    print(f"{'size':8}{'way':16}{'messages/s':>12}{'GB/s':>8}{'CPU s/GB':>10}")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        make_keys(Path(directory))
        ways = open_ways(stack, Path(directory))
        for size, size_bytes in SIZES.items():
            measured[size] = measure(ways, size_bytes, parsed.seconds, parsed.repeats)
            for name in (*FAST, *SLOW):
                rows.append(row(name, size, measured[size][name]))
                r = rows[-1]
                numbers = f"{r['messages_per_s']:>12,.1f}{r['gbps']:>8.3f}{r['cpu_s_per_gb']:>10.2f}"
                print(f"{size:8}{name:16}{numbers}", flush=True)
    result = figures(measured, rows)
    for name, value in result.items():
        print(f"{name:32}{value:>12.3f}")
    parsed.out.write_text(
        json.dumps(
            {
                "command": f"python -m benchmarks.transport --seconds {parsed.seconds:g} --repeats {parsed.repeats}",
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, loopback",
                "load_average": load,
                "versions": {"python": platform.python_version(), "pyzmq": zmq.__version__, "zmq": zmq.zmq_version()},
                "figures": result,
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
