"""The plot: final accuracy, and steps to the target, over staleness; one line per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.staleness_sweep.cells import METHODS, STALENESS, Protocol
from benchmarks.staleness_sweep.statistics import Entry

MARKERS = "osD^vPX"
OFFSET = 0.06
"""Methods stand beside each other, in categories of staleness, so that their intervals can be told apart"""


def draw(entries: Sequence[Entry], protocol: Protocol, target: float, path: Path) -> None:
    """Write a PNG. Whiskers are 95% intervals over seeds; a method that never reached the target has no point."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    for number, method in enumerate(METHODS):
        own = [entry for entry in entries if entry.method == method]
        if not own:
            continue
        shift = (number - (len(METHODS) - 1) / 2) * OFFSET
        style = {"marker": MARKERS[number], "markersize": 5, "linewidth": 1.3, "capsize": 2, "elinewidth": 0.8}
        places = [STALENESS.index(entry.staleness) + shift for entry in own]
        half_widths = [entry.accuracy.half_width or 0.0 for entry in own]
        left.errorbar(places, [e.accuracy.mean for e in own], yerr=half_widths, label=method, **style)
        timed = [(place, e.steps_to_target) for place, e in zip(places, own, strict=True) if e.steps_to_target]
        right.errorbar(
            [place for place, _ in timed],
            [estimate.mean for _, estimate in timed],
            yerr=[estimate.half_width or 0.0 for _, estimate in timed],
            label=method,
            **style,
        )
    left.set_ylabel(f"held-out sampled accuracy after {protocol.steps} steps")
    left.set_ylim(0, 1)
    if entries:
        left.legend(loc="lower left")
    right.set_ylabel(f"steps to {target:g} (seeds that reached it)")
    right.set_ylim(0, protocol.steps * 1.05)
    for axes in (left, right):
        axes.set_xticks(range(len(STALENESS)), [str(staleness) for staleness in STALENESS])
        axes.set_xlim(-0.4, len(STALENESS) - 0.6)
        axes.set_xlabel("staleness η: versions between sampling and training")
        axes.grid(alpha=0.3)
    seeds = max((entry.accuracy.count for entry in entries), default=0)
    figure.suptitle(f"Demo task at exact staleness: mean and 95% interval over seeds (up to {seeds})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
