"""The whole page: what stands where, and the tables around the charts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from slime_async import __version__
from slime_async.report import sections
from slime_async.report.findings import findings
from slime_async.report.run import Record, RunData
from slime_async.report.waiting import waiting_section
from slime_async.telemetry.summary import Summary

LISTED_EVENTS = 200
"""The last ones are shown; all are in ``events.jsonl``"""


def render(runs: Sequence[RunData]) -> str:
    """The page's HTML: one run, or several compared."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"
    parts = [
        ("Learning", _charts(sections.learning(runs))),
        ("Who waited for whom", waiting_section(runs)),
        ("Staleness", _charts(sections.staleness(runs))),
        ("Importance ratios", _charts(sections.ratios(runs))),
        ("Queue", _charts(sections.queue(runs))),
        ("Weights", _charts(sections.weights(runs))),
        ("Speed", _charts(sections.speed(runs))),
        ("Lengths", _charts(sections.lengths(runs))),
        ("Configuration", _configuration(runs)),
        ("Environment", _environment(runs)),
        ("Warnings and events", _events(runs)),
    ]
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(parts))
    body = "".join(f'<h2 id="s{i}">{escape(name)}</h2>{html}' for i, (name, html) in enumerate(parts))
    head = _tiles(runs[0].summary) if len(runs) == 1 else _comparison(runs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">slime_async {__version__}, written {_now()}</p>'
        f"<nav>{links}</nav>{head}{_findings(runs)}{body}</main><script>{_asset('page.js')}</script></body></html>\n"
    )


def _charts(figures: str) -> str:
    return f'<div class="charts">{figures}</div>'


def _asset(name: str) -> str:
    return files("slime_async.report").joinpath(name).read_text(encoding="utf-8")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def headline(summary: Summary) -> list[tuple[str, str]]:
    """The run in a few numbers: (value, words); what was not measured is left out."""
    s = summary
    learner, actors = (s.accounting.get(role, {}).get("computing") for role in ("learner", "actor"))
    tiles = [
        (s.outcome, "outcome"),
        (_change(s.accuracy_before, s.accuracy_after, "{:.1%}"), "held-out accuracy, before → after RL"),
        (_one(s.accuracy_supervised_only, "{:.1%}"), "… with more supervised steps instead"),
        (_change(s.reward_first, s.reward_last, "{:.3f}"), "reward, first → last tenth"),
        (f"{s.steps:,}", "steps"),
        (_one(s.wall_s, "{:,.0f} s"), "wall time"),
        (_one(s.tokens_per_s, "{:,.0f}"), "sampled tokens trained per second"),
        (
            _change(s.staleness_mean, s.staleness_max, "{:.3g}"),
            f"staleness, mean → largest (bound {s.staleness_bound})",
        ),
        (_one(s.overlap_fraction, "{:.0%}"), "generation and training overlap"),
        (_one(learner, "{:.0%}"), "of its time the learner computed"),
        (_one(actors, "{:.0%}"), "of their time actors computed"),
        (f"{s.tokens_masked_as_stale:,}", "tokens masked as stale"),
        (str(s.actor_deaths), "actor deaths"),
    ]
    return [(value, words) for value, words in tiles if value]


def _one(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _change(first: float | None, last: float | None, form: str) -> str:
    if first is None and last is None:
        return ""
    return " → ".join("–" if value is None else form.format(value) for value in (first, last))


def _tiles(summary: Summary) -> str:
    tiles = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for value, words in headline(summary)
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _comparison(runs: Sequence[RunData]) -> str:
    columns = [{words.partition(" (bound")[0]: value for value, words in headline(run.summary)} for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return _table(["", *(run.label for run in runs)], [[n, *(c.get(n, "–") for c in columns)] for n in names])


def _findings(runs: Sequence[RunData]) -> str:
    items = []
    for run in runs:
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        items += [f"<li>{escape(prefix + text)}</li>" for text in findings(run)]
        if warned := len(run.warnings()):
            count = "1 warning" if warned == 1 else f"{warned} warnings"
            items.append(f"<li>{escape(prefix)}{count}, <a href='#s10'>below</a>.</li>")
        if run.problems:
            unread = "; ".join(run.problems[:5]) + (f" and {len(run.problems) - 5} more" if run.problems[5:] else "")
            items.append(f'<li class="alarm">{escape(prefix)}Not readable: {escape(unread)}</li>')
    return f'<h3>What stands out</h3><ul class="findings">{"".join(items)}</ul>' if items else ""


def _configuration(runs: Sequence[RunData]) -> str:
    if len(runs) == 1:
        text = escape(runs[0].config_text)
        return f"<details open><summary>config.toml, as resolved</summary><pre>{text}</pre></details>"
    configs = [run.config for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [[key, *(_shown(config.get(key)) for config in configs)] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    heads = ["", *(run.label for run in runs)]
    return (
        _table(heads, different) if different else "<p>The same in all.</p>"
    ) + f"<details><summary>All fields</summary>{_table(heads, rows)}</details>"


def _environment(runs: Sequence[RunData]) -> str:
    described = [_flat_environment(run.environment) for run in runs]
    names = list(dict.fromkeys(name for environment in described for name in environment))
    clocks = [
        [run.label, track.process, f"{track.clock.offset_ns / 1e6:+.3f} ms ± {track.clock.error_ns / 1e6:.3f} ms"]
        for run in runs
        for track in run.tracks
        if track.clock is not None
    ]
    table = _table(["", *(run.label for run in runs)], [[n, *(e.get(n, "–") for e in described)] for n in names])
    if not names:
        table = '<p class="none">environment.json is missing</p>'
    return table + (
        f"<h3>Clocks against the hub's</h3>{_table(['run', 'process', 'offset'], clocks)}" if clocks else ""
    )


def _flat_environment(environment: Record) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in environment.items():
        if isinstance(value, dict):
            flat |= {str(inner): _shown(v) for inner, v in value.items()}
        elif name == "gpus":
            flat["gpus"] = ", ".join(f"{gpu['name']} ({gpu['memory_total_mib']:,} MiB)" for gpu in value) or "none"
        elif name == "command":
            flat["command"] = " ".join(map(str, value))
        else:
            flat[name] = f"{value:.1f}" if isinstance(value, float) else _shown(value)
    return flat


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _events(runs: Sequence[RunData]) -> str:
    rows = [
        [run.label, f"{(event['time_s'] - (run.start_s or 0.0)) / 60:+.2f}", str(event.get("event")), _details(event)]
        for run in runs
        for event in run.events[-LISTED_EVENTS:]
    ]
    if not rows:
        return '<p class="none">nothing recorded</p>'
    heads, shown = ["run", "minute", "event", ""], rows
    if len(runs) == 1:
        heads, shown = heads[1:], [row[1:] for row in rows]
    return _table(heads, shown)


def _details(event: Record) -> str:
    left = {name: value for name, value in event.items() if name not in ("event", "time_s")}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in left.items()
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def write_report(runs: Sequence[RunData], path: Path) -> None:
    """Write the page, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(runs), encoding="utf-8")
    temporary.replace(path)
