"""The end of a run as a table in the terminal."""

from __future__ import annotations

from slime_async.telemetry.summary import Summary


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """What was measured, in words; rows without a measurement are left out."""
    s = summary
    rows = [
        ("outcome", s.outcome),
        ("held-out accuracy before RL", _percent(s.accuracy_before)),
        ("held-out accuracy after RL", _percent(s.accuracy_after)),
        ("with more supervised steps instead", _percent(s.accuracy_supervised_only)),
        ("reward, first → last steps", _pair(s.reward_first, s.reward_last)),
        ("steps", str(s.steps)),
        ("wall time", None if s.wall_s is None else f"{s.wall_s:.1f} s"),
        ("trained", f"{s.trajectories_trained:,} trajectories, {s.tokens_trained:,} sampled tokens"),
        ("sampled tokens trained per second", None if s.tokens_per_s is None else f"{s.tokens_per_s:,.0f}"),
        ("staleness max / bound", None if s.staleness_max is None else f"{s.staleness_max} / {s.staleness_bound}"),
        ("staleness mean", None if s.staleness_mean is None else f"{s.staleness_mean:.2f}"),
        ("tokens masked as stale", f"{s.tokens_masked_as_stale:,}"),
        ("mismatch KL, last steps (floor)", _with_floor(s.mismatch_kl, s.mismatch_kl_floor)),
        ("warnings", ", ".join(s.warnings) or None),
        ("generation and training overlap", _percent(s.overlap_fraction)),
        ("the learner's time", _parts(s.accounting.get("learner"))),
        ("the actors' time", _parts(s.accounting.get("actor"))),
        ("updates that met requests in flight", f"{s.updates_with_requests_in_flight} of {s.steps}"),
        ("deaths of hub, learner, actors", f"{s.hub_deaths}, {s.learner_deaths}, {s.actor_deaths}"),
    ]
    return [(name, value) for name, value in rows if value is not None]


def print_summary(summary: Summary) -> None:
    """Print the table; plain where the output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for row in summary_rows(summary):
        table.add_row(*row)
    Console().print(table)


def _parts(fractions: dict[str, float] | None) -> str | None:
    """From 1% on, the largest first."""
    if not fractions:
        return None
    shown = sorted(((share, part) for part, share in fractions.items() if share >= 0.01), reverse=True)
    return ", ".join(f"{part.replace('_', ' ')} {share:.0%}" for share, part in shown)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def _pair(first: float | None, last: float | None) -> str | None:
    return None if first is None or last is None else f"{first:.3f} → {last:.3f}"


def _with_floor(value: float | None, floor: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.2g}" if floor is None else f"{value:.2g} ({floor:.2g})"
