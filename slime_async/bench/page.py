"""The comparison as one HTML file, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from slime_async.bench.compare import HEADS, Comparison, Row, cells
from slime_async.bench.contract import Clause
from slime_async.report.charts import Chart, Series, bars, draw
from slime_async.telemetry.accounting import PARTS


def render(comparison: Comparison, clauses: Sequence[Clause], title: str, hardware: str) -> str:
    rows = comparison.rows
    charts = "".join((_throughput(rows), _speed_and_staleness(rows), _windows(rows), _accuracy(rows)))
    broken = [clause for clause in clauses if not clause.holds]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(hardware)}</p>{_headline(comparison)}'
        f'<h2>Modes</h2>{_table(HEADS, [cells(row) for row in rows])}<div class="charts">{charts}</div>'
        f"<h2>Side by side</h2>{_timelines(rows)}"
        f"<h2>Is it fair?</h2>{_contract(clauses)}"
        + (f'<p class="alarm">{len(broken)} clauses are broken</p>' if broken else "")
        + f"</main><script>{_asset('page.js')}</script></body></html>\n"
    )


def write_page(comparison: Comparison, clauses: Sequence[Clause], title: str, hardware: str, path: Path) -> None:
    """Write it, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(comparison, clauses, title, hardware), encoding="utf-8")
    temporary.replace(path)


def _headline(comparison: Comparison) -> str:
    figures = comparison.figures()
    if not figures:
        return ""
    best, sync = str(figures["best_async_mode"]), str(figures["best_sync_mode"])
    tiles = (
        (f"{figures['async_over_best_sync']:.2f}×", f"samples/s of {best} over {sync}"),
        (f"{figures['bound_of_async_over_best_sync']:.2f}×", "at most, by what each side reaches alone"),
        (f"{figures['bottleneck_busy_fraction']:.0%}", f"of its saturated tokens/s: {figures['bottleneck']}"),
        (f"{figures['learner_wait_fraction']:.1%}", "of its time the learner waits"),
    )
    body = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(words)}</span></div>' for v, words in tiles)
    return f'<div class="tiles">{body}</div>'


def _throughput(rows: Sequence[Row]) -> str:
    return bars(
        "Throughput by mode",
        "Samples per second, as a share of the better synchronous mode's",
        [(row.measurement.mode, [row.over_best_sync.mean]) for row in rows],
        ["samples/s"],
    )


def _speed_and_staleness(rows: Sequence[Row]) -> str:
    series = [
        Series(row.measurement.mode, [(row.measurement.staleness_mean, row.samples_per_s.mean)], i, dots=True)
        for i, row in enumerate(rows)
    ]
    return draw(Chart("Speed against staleness", "mean staleness, versions", series, "Samples per second", zero=True))


def _windows(rows: Sequence[Row]) -> str:
    series = [
        Series(
            row.measurement.mode,
            [(i + 1.0, speed) for i, speed in enumerate(row.measurement.samples_per_s)],
            n,
            dots=True,
        )
        for n, row in enumerate(rows)
    ]
    return draw(Chart("Repeats", "window", series, "Samples per second of each window", zero=True))


def _accuracy(rows: Sequence[Row]) -> str:
    series = [Series(row.measurement.mode, row.measurement.accuracy, i) for i, row in enumerate(rows)]
    return draw(Chart("Reward against wall-clock time", "seconds of RL", series, "Mean of the last batches"))


def _timelines(rows: Sequence[Row]) -> str:
    """A bar per process, all to one scale."""
    shown_s = max((end for r in rows for cuts in r.measurement.timeline.values() for _, end, _ in cuts), default=1.0)
    used = [p for p in PARTS if any(p == c[2] for r in rows for cuts in r.measurement.timeline.values() for c in cuts)]
    lines = []
    for row in rows:
        for process, cuts in sorted(row.measurement.timeline.items(), reverse=True):
            boxes = "".join(
                f'<i class="part-{part}" style="flex:{end - start:.4f}" title="{escape(PARTS[part])}"></i>'
                for start, end, part in cuts
            )
            rest = shown_s - sum(end - start for start, end, _ in cuts)
            boxes += f'<i style="flex:{rest:.4f}"></i>' if rest > 0 else ""
            name = escape(f"{row.measurement.mode}, {process}")
            lines.append(f'<div class="row many"><span>{name}</span><div class="stack">{boxes}</div></div>')
    key = "".join(f'<span><i class="part-{part}"></i>{escape(PARTS[part])}</span>' for part in used)
    note = f"<p>The first {shown_s:.0f} s of each mode's windows.</p>"
    return note + "".join(lines) + f'<p class="legend parts">{key}</p>'


def _contract(clauses: Sequence[Clause]) -> str:
    items = "".join(f"<li{'' if clause.holds else ' class=alarm'}>{escape(str(clause))}</li>" for clause in clauses)
    return f'<ul class="findings">{items}</ul>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _asset(name: str) -> str:
    return files("slime_async.report").joinpath(name).read_text(encoding="utf-8")
