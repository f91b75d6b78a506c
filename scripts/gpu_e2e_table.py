#!/usr/bin/env python3
"""The table at the end of scripts/gpu-e2e: ``gpu_e2e_table.py RESULTS OUT``, folders that the script has filled.

Standard output gets a row per part with its exit code (124: its deadline came) and seconds, then a row per result.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

RUN_FIELDS = (
    "outcome",
    "steps",
    "wall_s",
    "accuracy_before",
    "accuracy_after",
    "reward_first",
    "reward_last",
    "staleness_mean",
    "staleness_max",
    "updates_with_requests_in_flight",
    "tokens_per_s",
    "overlap_fraction",
)


def rows(results: Path, out: Path) -> Iterator[tuple[str, str, str]]:
    for line in (results / "parts").read_text().splitlines():
        name, code, seconds = line.split()
        yield name, "exit code", f"{code} after {seconds} s"
    for report in sorted(results.glob("contract-*.xml")):
        suite = next(ElementTree.parse(report).iter("testsuite"))
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        yield report.stem, "tests", ", ".join(f"{count} {name}" for name, count in counts.items())
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                yield report.stem, "failed", str(case.get("name"))
    for benchmark in sorted(out.glob("*.json")):
        figures = json.loads(benchmark.read_text())["figures"]
        yield from ((benchmark.stem, name, f"{value:.4g}") for name, value in figures.items())
    for summary in sorted(results.glob("*.json")):
        read = json.loads(summary.read_text())
        for name in RUN_FIELDS:
            value = read[name]
            yield summary.stem, name, f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    results, out = map(Path, sys.argv[1:3])
    print("| part | what | result |\n| --- | --- | --- |")
    for row in rows(results, out):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
