"""``slime-async simulate``: a cluster in virtual time, with the run's own admission and queue code and given rates.

SCENARIO is a TOML file of the fields of ``slime_async.simulate.scenario``, or the ``bench.json`` of a benchmark, whose
every mode is then simulated from the rates measured there and held against what was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slime_async.cli.flags import toml_value
from slime_async.config import ConfigError
from slime_async.config.load import merge, read_toml
from slime_async.simulate.scenario import Scenario


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenario", metavar="SCENARIO", type=Path, help="TOML file, or the bench.json of a benchmark")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="over a field, such as engine.max_running=64"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcome there, too")


def run(parsed: argparse.Namespace) -> int:
    from slime_async.simulate.cluster import simulate

    if parsed.scenario.suffix == ".json":
        return check_benchmark(parsed.scenario, parsed.json)
    scenario = load_scenario(parsed.scenario, parsed.set)
    begun = time.monotonic()
    outcome = simulate(scenario)
    print("\n".join(outcome.lines()))
    print(f"  {outcome.simulated_s:,.0f} s simulated in {time.monotonic() - begun:.1f} s")
    if parsed.json:
        parsed.json.write_text(json.dumps(outcome.to_plain(), indent=1) + "\n", encoding="utf-8")
    return 0


def check_benchmark(path: Path, output: Path | None) -> int:
    """Print predicted against measured for every mode."""
    from slime_async.simulate.measured import check

    try:
        checks = check(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not the result of slime-async bench: {error}") from None
    print("| mode | simulated samples/s | measured | error |\n| --- | --- | --- | --- |")
    for one in checks:
        print(
            f"| {f'{one.workload} {one.mode}'.strip()} | {one.predicted:,.4g} | {one.measured:,.4g} | {one.error:.1%} |"
        )
    if output:
        output.write_text(json.dumps([one.to_plain() for one in checks], indent=1) + "\n", encoding="utf-8")
    return 0


def load_scenario(path: Path, settings: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Scenario:
    """A scenario file with ``KEY=VALUE`` settings over it. Raises ``ConfigError`` naming what is wrong."""
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write KEY=VALUE, such as --set engines=16")
        changes[tuple(key.split("."))] = toml_value(value)
    table = merge({**(base or {}), **read_toml(path)}, changes)
    try:
        return Scenario.model_validate(table)
    except ValidationError as error:
        lines = (f"{path}: {'.'.join(map(str, e['loc'])) or 'scenario'}: {e['msg']}" for e in error.errors())
        raise ConfigError("\n".join(lines)) from None
