"""What a host with more GPUs will do, written down before it is measured: every split of them, and all colocated.

    python -m benchmarks.splits [--devices 8] [--splits 2:6 4:4 6:2] [--modes colocated async-2] [--out FILE]
    python -m benchmarks.splits --measured bench.json     the error of what was written down, for every mode in it

From the rates that two GPUs have measured (``sync_async_2xh200.json``): an engine's and a learner's on one GPU each,
what they take from each other on one host, how long publications took. A batch grows with the devices, and a learner of
several ranks is as many times as fast: what data parallelism costs shows in the error. To be measured by::

    CONFIG=examples/bench/heavy_tailed_2gpus.toml \\
    FLAGS='--bench.devices 8 --bench.splits ["2:6","4:4","6:2"] --batch.groups 128' scripts/gpu-bench colocated async-2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slime_async.simulate.cluster import simulate
from slime_async.simulate.measured import scenario_of
from slime_async.simulate.scenario import Scenario

RESULTS = Path(__file__).parent / "results"
SOURCE = RESULTS / "sync_async_2xh200.json"
OUT = RESULTS / "splits_predicted.json"
MEASURED_DEVICES = 2


def scaled(base: Scenario, name: str, devices: int, learners: int, actors: int) -> Scenario:
    """``base`` of two devices on so many: one engine on each actor's, the learner's ranks on the others."""
    ranks = learners / base.learner.devices
    return base.model_copy(
        update={
            "name": name,
            "groups": base.groups * devices // MEASURED_DEVICES,
            "engines": actors,
            "learner": base.learner.model_copy(update={"devices": learners, "token_s": base.learner.token_s / ranks}),
        }
    )


def predictions(source: dict[str, Any], devices: int, splits: Sequence[str], modes: Sequence[str]) -> dict[str, Any]:
    """By the names that ``slime-async bench`` gives the modes."""
    found = {}
    for mode in modes:
        base = scenario_of(source, mode)
        if base.colocated:
            scenarios = [scaled(base, mode, devices, devices, devices)]
        else:
            halves = [tuple(map(int, split.split(":"))) for split in splits]
            scenarios = [scaled(base, f"{mode} {left}:{right}", devices, left, right) for left, right in halves]
        for scenario in scenarios:
            outcome = simulate(scenario)
            found[scenario.name] = {
                "samples_per_s": outcome.samples_per_s,
                "learner_busy": outcome.learner_busy,
                "engines_busy": outcome.engines_busy,
                "masked_fraction": outcome.masked_fraction,
                "bottleneck": outcome.bottleneck,
            }
    return found


def errors(predicted: dict[str, Any], measured: dict[str, Any]) -> None:
    """Print both, for every mode that was measured. Raises ``SystemExit`` where none was predicted."""
    rows = {name: row for name, row in measured["modes"].items() if name in predicted}
    if not rows:
        raise SystemExit(f"none of {sorted(measured['modes'])} was predicted: only {sorted(predicted)}")
    print("| mode | predicted, samples/s | measured | error |\n| --- | --- | --- | --- |")
    for name, row in rows.items():
        ours, theirs = predicted[name]["samples_per_s"], row["samples_per_s"]["mean"]
        print(f"| {name} | {ours:.1f} | {theirs:.1f} | {abs(ours - theirs) / theirs:.1%} |")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--splits", nargs="+", default=["2:6", "4:4", "6:2"], help="LEARNER:ACTORS")
    parser.add_argument("--modes", nargs="+", default=["colocated", "async-2"])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--measured", type=Path, help="a result of slime-async bench; nothing is predicted then")
    parsed = parser.parse_args(arguments)
    if parsed.measured is not None:
        written, measured = json.loads(parsed.out.read_text()), json.loads(parsed.measured.read_text())
        devices = measured["config"]["bench.devices"]
        if written["devices"] != devices:
            parser.error(f"{parsed.out.name} is of {written['devices']} devices, not {devices}")
        errors(written["modes"], measured)
        return 0
    for split in parsed.splits:
        left, _, right = split.partition(":")
        if not (left.isdigit() and right.isdigit() and 0 < int(left) < parsed.devices == int(left) + int(right)):
            parser.error(f"--splits {split!r}: write LEARNER:ACTORS that add up to --devices {parsed.devices}")
    source = json.loads(SOURCE.read_text())
    if unknown := [mode for mode in parsed.modes if mode not in source["modes"]]:
        parser.error(f"--modes {', '.join(unknown)}: {SOURCE.name} has {', '.join(source['modes'])}")
    found = predictions(source, parsed.devices, parsed.splits, parsed.modes)
    print("| mode | samples/s | learner busy | engines busy | masked | bottleneck |\n|" + " --- |" * 6)
    for name, one in found.items():
        busy = f"{one['learner_busy']:.0%} | {one['engines_busy']:.0%} | {one['masked_fraction']:.0%}"
        print(f"| {name} | {one['samples_per_s']:.1f} | {busy} | {one['bottleneck']} |")
    parsed.out.write_text(
        json.dumps(
            {
                "command": f"python -m benchmarks.splits --devices {parsed.devices}",
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "rates_of": f"{SOURCE.name}, {source['machine']}",
                "devices": parsed.devices,
                "modes": found,
            },
            indent=2,
        )
        + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
