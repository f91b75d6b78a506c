"""Charts as inline SVG: colours come from the page's style, so that they follow light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from slime_async.report.scale import Axis, Bucket, axis_for, label, thin

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 34
BOUND_ROOM = 1.15
"""Space above a bound, for its name"""
COLOURS = 8
"""How many the style sheet has, ``--c0`` … ``--c7``; later series begin again"""


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or with ``dots`` single measurements."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with lines over one pair of axes."""

    title: str
    x_label: str
    series: Sequence[Series]
    note: str = ""
    """What is shown, in a sentence"""
    bounds: Sequence[tuple[float, str]] = ()
    """Horizontal lines with their names"""
    zero: bool = False
    log: bool = False
    unit_interval: bool = False
    """The vertical axis is 0 … 1"""


def draw(chart: Chart) -> str:
    """The figure's HTML; one without any point says so."""
    lines = [(series, thin(series.points)) for series in chart.series]
    lines = [(series, buckets) for series, buckets in lines if buckets]
    if not lines:
        return _figure(chart, '<p class="none">nothing recorded</p>', [])
    xs = [bucket.x for _, buckets in lines for bucket in buckets]
    ys = [end for _, buckets in lines for bucket in buckets for end in (bucket.low, bucket.high)]
    ys += [y * BOUND_ROOM for y, _ in chart.bounds]
    x_axis = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1)
    y_axis = Axis(0.0, 1.0) if chart.unit_interval else axis_for(ys, zero=chart.zero, log=chart.log)
    marks = [_grid(x_axis, y_axis, chart.x_label)]
    marks += [_bound(y_axis, y, name) for y, name in chart.bounds]
    marks += [_band(x_axis, y_axis, series, buckets) for series, buckets in lines if not series.dots]
    marks += [_line(x_axis, y_axis, series, buckets) for series, buckets in lines]
    marks.append(f'<line class="cross" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    return _figure(chart, _svg(chart.title, "".join(marks), f"{x_axis.low!r},{x_axis.high!r}"), lines)


def bars(title: str, note: str, groups: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> str:
    """A histogram: per group (its label on the axis, one height per name); heights are shares."""
    if not groups:
        return _frame(title, note, '<p class="none">nothing recorded</p>', "")
    highest = max((height for _, heights in groups for height in heights), default=0.0)
    y_axis = axis_for([highest], zero=True)
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    thickness = slot * 0.8 / max(1, len(names))
    marks = [_y_grid(y_axis)]
    for i, (group, heights) in enumerate(groups):
        for j, height in enumerate(heights):
            x, y = LEFT + slot * (i + 0.1) + j * thickness, _y(y_axis, height)
            box = f'x="{x:.1f}" y="{y:.1f}" width="{thickness:.1f}" height="{HEIGHT - BOTTOM - y:.1f}"'
            text = escape(f"{names[j]}: {group} — {height:.1%}")
            marks.append(f'<rect class="f{j % COLOURS}" {box}><title>{text}</title></rect>')
        middle = LEFT + slot * (i + 0.5)
        marks.append(
            f'<text class="tick" text-anchor="middle" x="{middle:.1f}" y="{HEIGHT - 18}">{escape(group)}</text>'
        )
    legend = _legend([(name, j, False) for j, name in enumerate(names)]) if len(names) > 1 else ""
    return _frame(title, note, _svg(title, "".join(marks)), legend)


def areas(
    title: str, note: str, x_label: str, xs: Sequence[float], parts: Sequence[tuple[str, Sequence[float]]]
) -> str:
    """Shares over time, stacked to 1: per part (its CSS class, one share for each of ``xs``)."""
    if len(xs) < 2:
        return _frame(title, note, '<p class="none">nothing recorded</p>', "")
    x_axis, y_axis = Axis(xs[0], xs[-1]), Axis(0.0, 1.0)
    floor, marks = [0.0] * len(xs), []
    for name, shares in parts:
        top = [low + share for low, share in zip(floor, shares, strict=True)]
        upper = [_at(x_axis, y_axis, x, y) for x, y in zip(xs, top, strict=True)]
        lower = [_at(x_axis, y_axis, x, y) for x, y in zip(xs, floor, strict=True)]
        marks.append(f'<polygon class="part-{name}" points="{" ".join(upper + lower[::-1])}"/>')
        floor = top
    marks.append(_grid(x_axis, y_axis, x_label))
    return _frame(title, note, _svg(title, "".join(marks)), "")


def _figure(chart: Chart, body: str, lines: Sequence[tuple[Series, list[Bucket]]]) -> str:
    legend = ""
    if len(lines) > 1 or any(series.label for series, _ in lines):
        legend = _legend([(series.label, series.colour, series.dashed) for series, _ in lines])
    data = [
        {"label": series.label, "x": [_short(b.x) for b in buckets], "y": [_short(b.mean) for b in buckets]}
        for series, buckets in lines
    ]
    return _frame(chart.title, chart.note, body, legend, json.dumps(data) if data else "")


def _frame(title: str, note: str, body: str, legend: str, data: str = "") -> str:
    readout = f'<output data-points="{escape(data)}"></output>' if data else ""
    caption = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{caption}{body}{legend}{readout}</figure>"


def _svg(title: str, marks: str, x_range: str = "") -> str:
    extra = f' data-x="{x_range}" data-plot="{LEFT},{WIDTH - RIGHT}"' if x_range else ""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{extra}>{marks}</svg>'


def _legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    shown = (
        f'<span class="{"dashed " if dashed else ""}k{colour % COLOURS}">{escape(name)}</span>'
        for name, colour, dashed in entries
        if name
    )
    return f'<p class="legend">{"".join(shown)}</p>'


def _grid(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    marks = [_y_grid(y_axis)]
    for tick in x_axis.ticks():
        x = LEFT + x_axis.place(tick) * (WIDTH - LEFT - RIGHT)
        marks.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 18}">{label(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(f'<text class="axis" text-anchor="middle" x="{middle}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    return "".join(marks)


def _y_grid(axis: Axis) -> str:
    marks = []
    for tick in axis.ticks():
        y = _y(axis, tick)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text class="tick" text-anchor="end" x="{LEFT - 5}" y="{y + 4:.1f}">{label(tick)}</text>')
    return "".join(marks)


def _bound(axis: Axis, value: float, name: str) -> str:
    y = _y(axis, value)
    return (
        f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="bound" text-anchor="end" x="{WIDTH - RIGHT - 2}" y="{y - 4:.1f}">{escape(name)}</text>'
    )


def _band(x_axis: Axis, y_axis: Axis, series: Series, buckets: Sequence[Bucket]) -> str:
    """From the smallest to the largest of the points that share a bucket."""
    if all(bucket.low == bucket.high for bucket in buckets):
        return ""
    upper = [_at(x_axis, y_axis, bucket.x, bucket.high) for bucket in buckets]
    lower = [_at(x_axis, y_axis, bucket.x, bucket.low) for bucket in buckets]
    return f'<polygon class="band f{series.colour % COLOURS}" points="{" ".join(upper + lower[::-1])}"/>'


def _line(x_axis: Axis, y_axis: Axis, series: Series, buckets: Sequence[Bucket]) -> str:
    colour = series.colour % COLOURS
    if series.dots or len(buckets) == 1:
        places = (_at(x_axis, y_axis, bucket.x, bucket.mean).split(",") for bucket in buckets)
        return "".join(f'<circle class="f{colour}" cx="{x}" cy="{y}" r="4"/>' for x, y in places)
    points = " ".join(_at(x_axis, y_axis, bucket.x, bucket.mean) for bucket in buckets)
    return f'<polyline class="{"dashed " if series.dashed else ""}s{colour}" points="{points}"/>'


def _at(x_axis: Axis, y_axis: Axis, x: float, y: float) -> str:
    return f"{LEFT + x_axis.place(x) * (WIDTH - LEFT - RIGHT):.1f},{_y(y_axis, y):.1f}"


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - BOTTOM - TOP)


def _short(value: float) -> float:
    """Four digits are enough to read off."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
