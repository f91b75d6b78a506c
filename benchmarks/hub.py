"""What the hub sustains: its state machine alone, and its whole process on loopback, beside raw pyzmq.

    python -m benchmarks.hub [--seconds 4] [--million 1000000] [--chaos FILE] [--out FILE]

Trajectories of 64 KB and 16 MB from 1, 4 and 16 clients through the hub's process to a learner that takes them by
batches, with the journal and without, and the same bytes through a bare ROUTER in the same run. The disk's own rate is
that of sequential writes of 16 MB into the same directory, flushed at the end. ``--chaos`` takes over the figures of a
run of ``python -m benchmarks.chaos``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import zmq

from benchmarks.hub_parts import WAIT_S, Rate, beside, raw_rate, sender, take_batches
from slime_async.config import Config
from slime_async.config.dump import dump_toml
from slime_async.queue import LeasedBatch, QueueLimits, TaskStream, TrajectoryMeta, TrajectoryQueue

SIZES = {"64kb": 64 << 10, "16mb": 16 << 20}
BATCHES = {"64kb": 32, "16mb": 4}
CLIENTS = (1, 4, 16)
WARM_UP = 2
"""Batches that are not counted"""


def make_config(batch: int, journal: bool) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "benchmarks:none"},
            "task": {"train": {"train": {"factory": "benchmarks:none"}}},
            "evaluation": {"before": False, "after": False},
            "batch": {"groups": batch // 2, "group_size": 2},
            "staleness": {"max_staleness": 3, "on_stale": "train"},
            "hub": {"journal": journal},
        }
    )


@contextmanager
def hub_process(config: Config, directory: Path) -> Iterator[tuple[str, int]]:
    """Its address and pid."""
    directory.mkdir()
    (directory / "config.toml").write_text(dump_toml(config))
    argv = [sys.executable, "-m", "slime_async.cli.main", "hub", str(directory / "config.toml")]
    with (directory / "hub.log").open("wb") as log:
        process = subprocess.Popen([*argv, "--run-directory", str(directory)], stderr=log)
    try:
        ready, deadline = directory / "hub.address", time.monotonic() + WAIT_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the hub did not start: {(directory / 'hub.log').read_text()}")
            time.sleep(0.05)
        yield ready.read_text(), process.pid
    finally:
        process.kill()
        process.wait(WAIT_S)


def hub_rate(clients: int, size: str, journal: bool, seconds: float, directory: Path) -> tuple[Rate, int]:
    """What goes through, and the hub's resident bytes at the end."""
    config = make_config(BATCHES[size], journal)
    with (
        hub_process(config, directory / f"{size}-{clients}-{journal}") as (address, pid),
        beside(sender, address, clients, SIZES[size]),
    ):
        rate = asyncio.run(take_batches(address, seconds, SIZES[size], WARM_UP))
        return rate, resident_bytes(pid)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def disk_gbps(directory: Path, seconds: float) -> float:
    """Sequential writes of 16 MB, flushed to the disk at the end."""
    data, path = os.urandom(16 << 20), directory / "disk"
    begun, written = time.monotonic(), 0
    with path.open("wb", buffering=0) as file:
        while time.monotonic() - begun < seconds:
            written += file.write(data)
        os.fdatasync(file.fileno())
    ended = time.monotonic()
    path.unlink()
    return written / (ended - begun) / 1e9


def drive_queue(trajectories: int) -> Iterator[tuple[int, int]]:
    """One queue through so many trajectories' whole lives; (operations, trajectories) after every batch."""
    limits = QueueLimits(
        group_size=8,
        groups_per_batch=32,
        max_staleness=2,
        on_stale="mask",
        queue_trajectories=768,
        queue_bytes=1 << 40,
        max_trajectory_bytes=1 << 20,
    )
    queue = TrajectoryQueue(limits, TaskStream({"train": 1.0}, seed=0))
    queue.declare_sources({"train": 100_000})
    queue.learner_joined(1, 0, 0.0)
    queue.publish(1, 0, 0.0)
    done = operations = version = 0
    while done < trajectories:
        granted = queue.grant("a", 512, 0.0)
        for reservation in granted:
            queue.start(reservation.key, reservation.attempt, 0.0)
            meta = TrajectoryMeta(reservation.key, reservation.attempt, 900, 700, 1000, ((version, 700),), 1.0)
            queue.deliver(meta, "a", 0.0)
        leased = queue.lease(1, version, 0.0)
        assert isinstance(leased, LeasedBatch)
        queue.commit(1, version, 0.0)
        version += 1
        queue.publish(1, version, 0.0)
        queue.make_durable(1, version)
        queue.take_events()
        queue.take_released()
        operations += 3 * len(granted) + 4
        done += len(leased.keys)
        yield operations, done


def measure_queue(trajectories: int) -> dict[str, float]:
    """Operations per second, and the memory that grows between a tenth of the way and its end."""
    begun, early = time.monotonic(), 0
    operations = done = 0
    for so_far, done in drive_queue(trajectories):
        operations = so_far
        if not early and done >= trajectories / 10:
            early = resident_bytes(os.getpid())
    seconds = time.monotonic() - begun
    return {
        "operations_per_s": operations / seconds,
        "trajectories": done,
        "growth_mb": (resident_bytes(os.getpid()) - early) / 1e6,
    }


def measure(seconds: float, directory: Path) -> list[dict[str, Any]]:
    rows = []
    for size, size_bytes in SIZES.items():
        for clients in CLIENTS:
            raw = raw_rate(clients, size_bytes, BATCHES[size], seconds, WARM_UP)
            memory, _ = hub_rate(clients, size, False, seconds, directory)
            journal, resident = hub_rate(clients, size, True, seconds, directory)
            rows.append(
                {
                    "size": size,
                    "clients": clients,
                    "raw_per_s": raw.per_s,
                    "raw_gbps": raw.gbps,
                    "memory_per_s": memory.per_s,
                    "memory_gbps": memory.gbps,
                    "journal_per_s": journal.per_s,
                    "journal_gbps": journal.gbps,
                    "hub_resident_mb": resident / 1e6,
                }
            )
            print(row_text(rows[-1]), flush=True)
    return rows


COLUMNS = ("raw pyzmq", "hub, memory", "hub, journal")
HEAD = f"{'size':6}{'clients':>8}{''.join(f'{name:>20}' for name in COLUMNS)}{'memory/raw':>12}{'jrnl/mem':>10}"


def row_text(row: dict[str, Any]) -> str:
    cells = [f"{row[f'{kind}_per_s']:.0f}/s {row[f'{kind}_gbps']:.2f} GB/s" for kind in ("raw", "memory", "journal")]
    over_raw, over_memory = row["memory_per_s"] / row["raw_per_s"], row["journal_per_s"] / row["memory_per_s"]
    shown = "".join(f"{cell:>20}" for cell in cells)
    return f"{row['size']:6}{row['clients']:>8}{shown}{over_raw:>12.2f}{over_memory:>10.2f}"


def figures(rows: Sequence[dict[str, Any]], queue: dict[str, float], disk: float) -> dict[str, float]:
    """Over the numbers of clients: sums, so that one noisy cell weighs a third."""

    def ratio(size: str, upper: str, lower: str) -> float:
        some = [row for row in rows if row["size"] == size]
        return float(sum(row[upper] for row in some) / sum(row[lower] for row in some))

    return {
        "queue_operations_per_s": queue["operations_per_s"],
        "queue_growth_mb_per_million": queue["growth_mb"],
        "journal_over_memory": ratio("64kb", "journal_per_s", "memory_per_s"),
        "journal_over_memory_16mb": ratio("16mb", "journal_per_s", "memory_per_s"),
        "journal_gbps_16mb": max(row["journal_gbps"] for row in rows if row["size"] == "16mb"),
        "disk_gbps": disk,
        "hub_over_raw_64kb": ratio("64kb", "memory_per_s", "raw_per_s"),
        "hub_over_raw_16mb": ratio("16mb", "memory_per_s", "raw_per_s"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="per cell of the table")
    parser.add_argument("--million", type=int, default=1_000_000, help="trajectories through the state machine")
    parser.add_argument("--chaos", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "hub.json")
    parsed = parser.parse_args(arguments)
    queue = measure_queue(parsed.million)
    print(f"state machine: {queue['operations_per_s']:,.0f} operations/s, {queue['growth_mb']:+.1f} MB over the run")
    print(HEAD)
    with tempfile.TemporaryDirectory() as directory:
        disk = disk_gbps(Path(directory), parsed.seconds)
        rows = measure(parsed.seconds, Path(directory))
    result: dict[str, Any] = {**figures(rows, queue, disk)}
    if parsed.chaos is not None:
        result |= json.loads(parsed.chaos.read_text())["figures"]
    for name, value in result.items():
        print(f"{name:32}{value:>14.3f}" if isinstance(value, float) else f"{name:32}{value!s:>14}")
    parsed.out.write_text(
        json.dumps(
            {
                "command": f"python -m benchmarks.hub --seconds {parsed.seconds:g} --million {parsed.million}",
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, loopback",
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
