"""``slime-async doctor``: Python, packages, GPU, driver, ports, memory, disk and variables, each with its remedy.

On several nodes it also finds what is wrong between them: versions, variables, clocks, ports, the shared directory.
``--launcher`` runs it on all nodes of a Ray cluster or a Slurm job; elsewhere one collects and each node reports to it.

Exit code 0 when runs will work, 1 when something will make them fail; with ``--strict`` warnings count, too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from slime_async.addresses import own_address
from slime_async.cli.doctor_nodes import COLLECT_TIMEOUT_S, Collector, report
from slime_async.config import Config, load_config
from slime_async.doctor.finding import Finding

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="also check what this file asks for [defaults]"
    )
    parser.add_argument("--strict", action="store_true", help="warnings make the exit code 1, too")
    parser.add_argument("--launcher", choices=("slurm", "ray"), help="on every node of this Slurm job, or Ray cluster")
    parser.add_argument("--collect", metavar="N", type=int, help="wait for the reports of N nodes, and compare them")
    parser.add_argument("--listen", metavar="HOST:PORT", help="where to collect [this machine's address, a free port]")
    parser.add_argument("--report-to", metavar="HOST:PORT", help="tell the collector there of this node")


def run(parsed: argparse.Namespace) -> int:
    config = Config() if parsed.config is None else load_config(parsed.config, {})
    if parsed.report_to is not None:
        asyncio.run(report(config, parsed.report_to, list(examine(config))))
        return 0
    if parsed.launcher is not None or parsed.collect is not None:
        found = compare(config, parsed)
    else:
        found = list(examine(config))
    show(found)
    bad = ("error", "warning") if parsed.strict else ("error",)
    return int(any(finding.level in bad for finding in found))


def compare(config: Config, parsed: argparse.Namespace) -> list[Finding]:
    """All nodes, and what is wrong between them. Raises ``ConfigError`` where none can be asked."""
    from slime_async.cli.doctor_launch import Start, on_ray, on_slurm
    from slime_async.doctor.cluster import check_cluster

    host, _, port = (parsed.listen or f"{own_address()}:0").rpartition(":")
    start: Start = tell_how
    wanted = parsed.collect
    if parsed.launcher is not None:
        wanted, start = (on_slurm if parsed.launcher == "slurm" else on_ray)(parsed.config)
    nodes = asyncio.run(Collector(config, wanted).collect(host, int(port), start, COLLECT_TIMEOUT_S))
    return list(check_cluster(config, nodes, wanted))


def tell_how(address: str) -> None:
    """For nodes that nobody starts for us."""
    print(f"collecting: run on every node: slime-async doctor CONFIG --report-to {address}", flush=True)


def examine(config: Config) -> Iterator[Finding]:
    """Look at everything; takes seconds, most of them to import torch."""
    from slime_async.doctor.devices import check_devices, torch_build
    from slime_async.doctor.machine import check_machine, check_network
    from slime_async.doctor.packages import check_packages
    from slime_async.doctor.variables import check_variables
    from slime_async.telemetry.environment import query_gpus

    yield from check_packages()
    yield from check_devices(query_gpus(), torch_build())
    yield from check_machine(config)
    yield from check_network(config)
    yield from check_variables(os.environ, [name for _, name in socket.if_nameindex()])


def show(found: Sequence[Finding]) -> None:
    """One line per finding, its remedy below; the counts at the end."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for finding in found:
        mark, style = MARKS[finding.level]
        console.print(Text.assemble((f" {mark} ", style), (f"{finding.subject}: ", "bold"), finding.text))
        if finding.remedy:
            console.print(Text(f"   → {finding.remedy}", style=style))
    errors, warnings = (sum(f.level == level for f in found) for level in ("error", "warning"))
    console.print(f"{len(found)} things looked at, {errors} errors, {warnings} warnings")
