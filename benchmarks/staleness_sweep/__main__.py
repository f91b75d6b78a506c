"""Measure what off-policy correction is worth at exact staleness; ``docs/off-policy.md`` says what came out.

    python -m benchmarks.staleness_sweep [--seeds 0 1 2] [--steps 120] [--cells PATTERN …] [--jobs 1] [--time-limit S]
    python -m benchmarks.staleness_sweep --report        only the tables, JSON and plot of the cells finished so far

Stop it whenever you like: finished cells stay in --directory, and the same command goes on with the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from benchmarks.staleness_sweep.cells import Cell, Protocol, grid
from benchmarks.staleness_sweep.report import write_report
from benchmarks.staleness_sweep.store import Store
from benchmarks.staleness_sweep.training import CellResult, run_cell, warm_started

RESULTS = Path(__file__).parents[1] / "results" / "staleness_sweep.json"
CELLS = Path("runs") / "staleness_sweep"
TARGET = 0.6
"""About twice what the warm start reaches"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, sampling and fresh weights")
    parser.add_argument("--steps", type=int, default=Protocol().steps, help="batches that every cell trains")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="PATTERN", help="'tis-*' or '*-eta0-seed1'")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each on one thread")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="S", help="begin no cell after this")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is finished")
    parser.add_argument("--target", type=float, default=TARGET, help="accuracy whose first step is reported")
    parser.add_argument("--directory", type=Path, default=CELLS, help="of finished cells and warm starts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON; the plot goes beside it")
    arguments = parser.parse_args(argv)
    run(arguments, Protocol(steps=arguments.steps))


def run(arguments: argparse.Namespace, protocol: Protocol) -> None:
    """What the command does, under any protocol."""
    cells = list(grid(arguments.seeds, arguments.cells))
    if not cells:
        raise SystemExit(f"no cell matches {arguments.cells}: names are like {next(grid([0])).name}")
    store = Store(arguments.directory, protocol)
    if not arguments.report:
        missing = [cell for cell in cells if not store.has(cell)]
        print(f"{len(cells)} cells, {len(missing)} to run", flush=True)
        deadline_s = time.monotonic() + arguments.time_limit
        for count, (cell, result) in enumerate(_run(missing, protocol, arguments, deadline_s), 1):
            store.save(cell, result)
            print(f"[{count}/{len(missing)}] {cell.name}: {result.accuracy:.3f}, {result.seconds:.0f} s", flush=True)
    print(write_report(store.load(), cells, protocol, arguments.target, arguments.out))


def _run(
    cells: Sequence[Cell], protocol: Protocol, arguments: argparse.Namespace, deadline_s: float
) -> Iterator[tuple[Cell, CellResult]]:
    """Cells as they finish; none begins after ``deadline_s`` of the monotonic clock."""
    if arguments.jobs == 1:
        for cell in cells:
            if time.monotonic() >= deadline_s:
                return
            yield cell, run_cell(cell, protocol, arguments.directory)
        return
    for seed in dict.fromkeys(cell.seed for cell in cells):
        warm_started(seed, protocol, arguments.directory)  # before several cells want it
    left = iter(cells)
    running: dict[Future[CellResult], Cell] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        while True:
            while len(running) < arguments.jobs and time.monotonic() < deadline_s and (begun := next(left, None)):
                running[pool.submit(run_cell, begun, protocol, arguments.directory)] = begun
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()


if __name__ == "__main__":
    main()
