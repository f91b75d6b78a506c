"""Writes the tables of docs/transport.md from the results of benchmarks.transport and benchmarks.fetch.

python -m benchmarks.transport_docs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "transport.md"
WAYS = {
    "ours": "our streams",
    "raw": "raw pyzmq, in one piece",
    "raw, arrays": "raw pyzmq, the arrays",
    "queue": "`multiprocessing.Queue`, pickle",
    "http": "HTTP post, JSON",
}
CURVE = {"ours": "plain", "ours, CURVE": "CURVE, one connection", "ours, CURVE ×4": "CURVE, four connections"}


def results(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return result


def fetch_table(fetch: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {row['batch_s']:.2f} s | {row['gbps']:.2f} | {row['rank_0_cpu_s_per_batch']:.2f} s | "
        f"{row['other_cpu_s_per_batch']:.2f} s |"
        for name, row in fetch["rows"].items()
    ]
    return "\n".join(
        [
            f"`{fetch['command']}`: {fetch['ranks']} ranks, {fetch['trajectories_per_batch']} trajectories a batch, "
            "with routed experts;",
            f"{fetch['machine']}, shared by hub, actors and ranks, load average before {fetch['load_average']:.0f}:",
            "",
            "| | a batch takes | GB/s | CPU of rank 0 per batch | of another rank |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def rates_tables(*transports: dict[str, Any]) -> str:
    return "\n".join(
        [
            *(f"{rates_table(transport)}\n" for transport in transports),
            "Raw pyzmq has the same sockets, high-water marks and acknowledgements, but no codec, checks or loop. The",
            "one piece was made beforehand; the arrays are those of the trajectory, a frame each.",
        ]
    )


def rates_table(transport: dict[str, Any]) -> str:
    cells = {(row["size"], row["way"]): row for row in transport["rows"]}
    rows = [
        f"| {name} | {cells['64kib', way]['messages_per_s']:,.0f} | {cells['1mib', way]['gbps']:.3f} | "
        f"{cells['16mib', way]['gbps']:.3f} | {cells['1mib', way]['cpu_s_per_gb']:.2f} |"
        for way, name in WAYS.items()
    ]
    return "\n".join(
        [
            f"`{transport['command']}`: one sender, one receiver;",
            f"{transport['machine']}, load average before {transport['load_average']:.0f} (others' load",
            "takes more from ways with more to compute):",
            "",
            "| way | 64 KiB: messages/s | 1 MiB: GB/s | 16 MiB: GB/s | CPU s/GB at 1 MiB |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def curve_tables(*transports: dict[str, Any]) -> str:
    return "\n\n".join(map(curve_table, transports))


def curve_table(transport: dict[str, Any]) -> str:
    cells = {(row["size"], row["way"]): row for row in transport["rows"]}
    rows = [
        f"| {name} | {cells['64kib', way]['messages_per_s']:,.0f} | {cells['1mib', way]['gbps']:.3f} | "
        f"{cells['1mib', way]['cpu_s_per_gb']:.2f} |"
        for way, name in CURVE.items()
    ]
    head = ["| | 64 KiB: messages/s | 1 MiB: GB/s | CPU s/GB at 1 MiB |", "|---|---|---|---|"]
    return "\n".join([f"Both ends on {transport['machine'].split(',')[0]}:", "", *head, *rows])


def main() -> None:
    page, transports = PAGE.read_text(), (results("transport"), results("transport_many_cores"))
    tables = {"FETCH": fetch_table(results("fetch"))}
    tables |= {"TRANSPORT": rates_tables(*transports), "CURVE": curve_tables(*transports)}
    for name, table in tables.items():
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        after = rest.partition("\n<!-- end -->")[2]
        assert after, f"{PAGE} has no place for {name}"
        page = f"{before}<!-- {name} -->\n{table}\n<!-- end -->{after}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
