"""Our streams beside raw pyzmq, HTTP with JSON, and multiprocessing.Queue with pickle, on loopback.

    python -m benchmarks.transport [--seconds 1] [--repeats 9] [--sizes 64kib,1mib] [--ways ours raw] [--out FILE]

Trajectories of 64 KiB, 1 MiB and 16 MiB from one process to another, each acknowledged; the ways take turns, slice by
slice, so that all of them meet the same neighbours. A figure "over" another is the median of the ratios of slices that
followed each other. CPU seconds are those of both processes, ZeroMQ's threads included. A run of some sizes or ways
only prints its figures, and writes them where ``--out`` says.
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
FAST = ("ours", "raw", "raw, arrays", "ours, CURVE", "raw, CURVE")
SLOW = ("ours, CURVE ×4", "queue", "http")
"""Measured in fewer slices"""
SLOW_REPEATS = 3
WARM_UP_S = 0.3

Slices = dict[str, list[Slice]]


def open_ways(stack: ExitStack, keys: Path, names: Sequence[str]) -> dict[str, Way]:
    arguments: dict[str, tuple[Any, ...]] = {
        "ours": (receive_ours, send_ours, None),
        "raw": (receive_raw, send_raw, None),
        "raw, arrays": (receive_raw, send_raw, None, True),
        "ours, CURVE": (receive_ours, send_ours, keys),
        "raw, CURVE": (receive_raw, send_raw, keys),
        "ours, CURVE ×4": (receive_ours, send_ours, keys, 4),
        "queue": (receive_queue, send_queue, SPAWN.Queue(), SPAWN.Queue()),
        "http": (receive_http, send_http),
    }
    return {name: stack.enter_context(opened(*arguments[name])) for name in names}


def measure(ways: Mapping[str, Way], size_bytes: int, seconds: float, repeats: int) -> Slices:
    slices: Slices = {name: [] for name in ways}
    for name in filter(ways.__contains__, FAST):
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
    """Those whose sizes and ways were measured."""
    ratios = {
        "gbps_over_raw_1mib": ("1mib", "ours", "raw"),
        "gbps_over_raw_16mib": ("16mib", "ours", "raw"),
        "messages_over_raw_64kib": ("64kib", "ours", "raw"),
        "gbps_over_raw_arrays_1mib": ("1mib", "ours", "raw, arrays"),
        "messages_over_raw_arrays_64kib": ("64kib", "ours", "raw, arrays"),
        "curve_over_raw_curve_1mib": ("1mib", "ours, CURVE", "raw, CURVE"),
        "over_queue_64kib": ("64kib", "ours", "queue"),
        "over_queue_1mib": ("1mib", "ours", "queue"),
        "over_http_64kib": ("64kib", "ours", "http"),
        "over_http_1mib": ("1mib", "ours", "http"),
    }
    cells = {
        "messages_per_s_64kib": ("64kib", "ours", "messages_per_s"),
        "gbps_1mib": ("1mib", "ours", "gbps"),
        "gbps_16mib": ("16mib", "ours", "gbps"),
        "curve_gbps": ("1mib", "ours, CURVE", "gbps"),
        "curve_gbps_4_connections": ("1mib", "ours, CURVE ×4", "gbps"),
        "cpu_s_per_gb_1mib": ("1mib", "ours", "cpu_s_per_gb"),
        "raw_cpu_s_per_gb_1mib": ("1mib", "raw", "cpu_s_per_gb"),
        "curve_cpu_s_per_gb_1mib": ("1mib", "ours, CURVE", "cpu_s_per_gb"),
    }
    by_cell = {(row["size"], row["way"]): row for row in rows}
    return {
        name: over(measured[size], upper, lower)
        for name, (size, upper, lower) in ratios.items()
        if {(size, upper), (size, lower)} <= by_cell.keys()
    } | {name: by_cell[size, way][key] for name, (size, way, key) in cells.items() if (size, way) in by_cell}


def sizes_of(text: str) -> list[str]:
    sizes = text.split(",")
    if unknown := set(sizes) - SIZES.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose among {', '.join(SIZES)}")
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one slice")
    parser.add_argument("--repeats", type=int, default=9, help="slices of each fast way and size")
    parser.add_argument("--sizes", type=sizes_of, default=list(SIZES), help=f"among {','.join(SIZES)}")
    parser.add_argument("--ways", nargs="+", choices=(*FAST, *SLOW), default=[*FAST, *SLOW])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/transport.json, for a run of everything")
    parsed = parser.parse_args(arguments)
    out: Path | None = parsed.out
    if out is None and parsed.sizes == list(SIZES) and parsed.ways == [*FAST, *SLOW]:
        out = Path(__file__).parent / "results" / "transport.json"
    measured: dict[str, Slices] = {}
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    print(f"{'size':8}{'way':16}{'messages/s':>12}{'GB/s':>8}{'CPU s/GB':>10}")
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        make_keys(Path(directory))
        ways = open_ways(stack, Path(directory), parsed.ways)
        for size in parsed.sizes:
            measured[size] = measure(ways, SIZES[size], parsed.seconds, parsed.repeats)
            for name in parsed.ways:
                rows.append(row(name, size, measured[size][name]))
                r = rows[-1]
                numbers = f"{r['messages_per_s']:>12,.1f}{r['gbps']:>8.3f}{r['cpu_s_per_gb']:>10.2f}"
                print(f"{size:8}{name:16}{numbers}", flush=True)
    result = figures(measured, rows)
    for name, value in result.items():
        print(f"{name:32}{value:>12.3f}")
    if out is None:
        return 0
    out.write_text(
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
