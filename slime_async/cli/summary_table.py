"""A run's result as a table, for the terminal and for pasting."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from slime_async.telemetry.summary import Summary


def print_summary(summary: Summary) -> None:
    """What was reached, how stale it was, and how well both sides kept busy."""
    table = Table(title=f"run {summary.outcome}", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in summary_rows(summary):
        table.add_row(name, value)
    Console().print(table)


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """Name and value of each line; what was not measured is a dash."""
    s = summary
    return [
        ("held-out accuracy before RL", _percent(s.accuracy_before)),
        ("held-out accuracy after RL", _percent(s.accuracy_after)),
        ("… with supervised steps instead", _percent(s.accuracy_supervised_only)),
        ("steps", str(s.steps)),
        ("trajectories trained", f"{s.trajectories_trained:,}"),
        ("sampled tokens trained, per second", "–" if s.tokens_per_s is None else f"{s.tokens_per_s:,.0f}"),
        ("staleness mean / max / bound", f"{_number(s.staleness_mean)} / {s.staleness_max} / {s.staleness_bound}"),
        ("tokens masked as stale", f"{s.tokens_masked_as_stale:,}"),
        ("updates with requests in flight", f"{s.updates_with_requests_in_flight} of {s.steps}"),
        ("overlap of generation and training", _percent(s.overlap_fraction)),
        ("actor deaths", str(s.actor_deaths)),
        ("wall time", "–" if s.wall_s is None else f"{s.wall_s:.0f} s"),
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
