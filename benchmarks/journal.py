"""What the journal costs: appends and reads beside memory, the disk itself, and SQLite, in one run on one directory.

    python -m benchmarks.journal [--directory DIR] [--volume-mb 128] [--rounds 5] [--out FILE]

Each store takes the same trajectories (64 KB and 16 MB, four arrays each) with the event that accepts them, drops those
that are older than a window, and reads back what it keeps. ``together``: appends that go out in one write or
transaction, as the hub's writer does with those that wait. Rates are the best of several rounds, in which the stores
take turns, so that a busy machine disturbs them least; CPU times are the least. ``synced`` counts the time until
everything is on the disk, as the disk's own rate does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.journal_stores import DiskStore, JournalStore, MemoryStore, SqliteStore, Store
from slime_async.queue import TrajectoryMeta
from slime_async.queue.events import Accepted
from slime_async.trajectory import TrajectoryKey
from slime_async.transport.journal import Entry, Journal, JournalWriter

KINDS = {"64kb": 64 << 10, "16mb": 16 << 20}
TOGETHER = {"64kb": 16, "16mb": 4}
KEPT = 0.25
"""The part of the volume that a store keeps: the hub's queue"""
CLIENTS = 16
Payload = list[memoryview]
VARIANTS: tuple[tuple[str, Callable[[Path], Store], bool], ...] = (
    ("memory", MemoryStore, False),
    ("disk", DiskStore, True),
    ("journal", JournalStore, False),
    ("journal", JournalStore, True),
    ("journal, fsync", partial(JournalStore, fsync=True), True),
    ("sqlite, off", SqliteStore, False),
    ("sqlite, off", SqliteStore, True),
    ("sqlite, full", partial(SqliteStore, synchronous="FULL"), True),
)
"""Name, store, and whether appends go out together"""


def make_payloads(size: int) -> list[Payload]:
    """Some different ones, so that no cache helps; each as four arrays."""
    data = os.urandom(size + 4096)
    return [[memoryview(data)[i + q * size // 4 : i + (q + 1) * size // 4] for q in range(4)] for i in range(64)]


def entry(number: int, payload: Payload) -> Entry:
    key = TrajectoryKey(number // 8, number % 8)
    size = sum(part.nbytes for part in payload)
    meta = TrajectoryMeta(key, 1, 8192, 7000, size, ((1200, 3000), (1201, 4000)), 0.75)
    return Entry([Accepted(meta, 1201)], {key: payload})


class Meter:
    """MB/s and CPU µs per append, by name; the best of the rounds counts."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.figures: dict[str, float] = {}

    def rate(self, name: str, appends: int, seconds: float) -> None:
        self.figures[name] = max(self.figures.get(name, 0.0), appends * self._size / seconds / 1e6)

    def cpu(self, name: str, appends: int, seconds: float) -> None:
        self.figures[name] = min(self.figures.get(name, math.inf), seconds / appends * 1e6)


def play(store: Store, payloads: list[Payload], volume: int, together: int, meter: Meter, name: str) -> None:
    """Append ``volume`` bytes, dropping what is old, then read back what was kept."""
    size = sum(part.nbytes for part in payloads[0])
    count = volume // size // together * together
    kept = max(1, int(count * KEPT))
    entries = [entry(number, payloads[number % len(payloads)]) for number in range(count)]
    keys = [next(iter(one.payloads)) for one in entries]
    begun, cpu = time.perf_counter(), time.process_time()
    for first in range(0, count, together):
        store.append(entries[first : first + together])
        store.release(keys[max(0, first - kept) : max(0, first + together - kept)])
    meter.rate(f"{name} append", count, time.perf_counter() - begun)
    meter.cpu(f"{name} cpu_us", count, time.process_time() - cpu)
    store.sync()
    meter.rate(f"{name} synced", count, time.perf_counter() - begun)
    if store.read(keys[-1]):
        read = time.perf_counter()
        assert sum(store.read(key) for key in keys[count - kept :]) == kept * size
        meter.rate(f"{name} read", kept, time.perf_counter() - read)
    store.close()


async def play_writer(directory: Path, payloads: list[Payload], volume: int, meter: Meter, name: str) -> None:
    """The hub's way: clients that each wait for their append before the next."""
    writer = JournalWriter(Journal.open(directory).journal)
    size = sum(part.nbytes for part in payloads[0])
    count = volume // size
    kept = max(1, int(count * KEPT))
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            one = entry(number, payloads[number % len(payloads)])
            await writer.append(one.events, one.payloads)
            writer.release([TrajectoryKey((number - kept) // 8, (number - kept) % 8)] if number >= kept else [])

    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    meter.rate(f"{name} append", count, time.perf_counter() - begun)
    meter.cpu(f"{name} cpu_us", count, time.process_time() - cpu)
    await writer.close()


def measure(parent: Path, volume: int, rounds: int) -> dict[str, dict[str, float]]:
    results = {}
    for kind, size in KINDS.items():
        payloads, meter = make_payloads(size), Meter(size)
        for _ in range(rounds):
            for name, make, grouped in VARIANTS:
                together = TOGETHER[kind] if grouped else 1
                with tempfile.TemporaryDirectory(dir=parent) as directory:
                    play(make(Path(directory)), payloads, volume, together, meter, f"{name} ×{together}")
            with tempfile.TemporaryDirectory(dir=parent) as directory:
                asyncio.run(play_writer(Path(directory), payloads, volume, meter, f"journal writer, {CLIENTS} clients"))
        results[kind] = meter.figures
    return results


def table(kind: str, figures: dict[str, float]) -> str:
    rows = [
        f"| {kind} | append MB/s | appends/s | CPU µs/append | synced MB/s | read MB/s |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(key.rpartition(" ")[0] for key in figures):
        rate = figures[f"{name} append"]
        cells = [f"{rate:,.0f}", f"{rate * 1e6 / KINDS[kind]:,.0f}"]
        for what in ("cpu_us", "synced", "read"):
            cells.append(f"{figures[key]:,.0f}" if (key := f"{name} {what}") in figures else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="on the disk to measure [the system's temporary one]")
    parser.add_argument("--volume-mb", type=int, default=128, help="per store, size and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    results = measure(arguments.directory or Path(tempfile.gettempdir()), arguments.volume_mb << 20, arguments.rounds)
    figures: dict[str, float] = {}
    for kind, rates in results.items():
        print(table(kind, rates), end="\n\n", flush=True)
        group = TOGETHER[kind]
        figures[f"journal_over_memory_{kind}"] = rates["journal ×1 append"] / rates["memory ×1 append"]
        figures[f"journal_over_disk_{kind}"] = rates[f"journal ×{group} synced"] / rates[f"disk ×{group} synced"]
        figures[f"journal_over_sqlite_{kind}"] = rates["journal ×1 append"] / rates["sqlite, off ×1 append"]
        figures[f"sqlite_cpu_over_journal_cpu_{kind}"] = rates["sqlite, off ×1 cpu_us"] / rates["journal ×1 cpu_us"]
        figures |= {f"{kind}: {name}": value for name, value in rates.items()}
    figures = {name: round(value, 3) for name, value in figures.items()}
    print("\n".join(f"{name} {value}" for name, value in figures.items() if "_over_" in name))
    if arguments.out:
        environment = {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load_average": round(os.getloadavg()[1], 1),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"figures": figures, "environment": environment}, indent=2) + "\n")


if __name__ == "__main__":
    main()
