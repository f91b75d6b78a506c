"""``slime-async doctor``: Python, packages, GPU, driver, ports, memory, disk and variables, each with its remedy.

Exit code 0 when runs will work, 1 when something will make them fail; with ``--strict`` warnings count, too.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slime_async.config import Config, load_config

if TYPE_CHECKING:
    from slime_async.doctor.finding import Finding

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "error": ("✗", "bold red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="also check what this file asks for [defaults]"
    )
    parser.add_argument("--strict", action="store_true", help="warnings make the exit code 1, too")


def run(parsed: argparse.Namespace) -> int:
    config = Config() if parsed.config is None else load_config(parsed.config, {})
    found = list(examine(config))
    show(found)
    bad = ("error", "warning") if parsed.strict else ("error",)
    return int(any(finding.level in bad for finding in found))


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
