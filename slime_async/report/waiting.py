"""Who computed and who waited for what: as bars, as numbers, and over time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from slime_async.report.charts import areas
from slime_async.report.run import RunData
from slime_async.telemetry.accounting import PARTS, UNACCOUNTED, Account, accounts, gate_spans, pieces, rl_accounts
from slime_async.telemetry.intervals import Interval
from slime_async.telemetry.spans import ProcessRole

SIDES: tuple[tuple[ProcessRole, str], ...] = (("learner", "Learner"), ("actor", "Actors"))
BINS = 90
"""Over time: about one per four pixels"""


def waiting_section(runs: Sequence[RunData]) -> str:
    """Bars and a table for all runs; of a single one also how it went over time."""
    rl = [(run, rl_accounts(run.tracks)) for run in runs]
    whole = [(run, accounts(run.tracks)) for run in runs]
    if not any(sides for _, sides in whole):
        return '<p class="none">no spans recorded</p>'
    shown = [part for part in PARTS if any(part in a.seconds for _, sides in whole for a in sides.values())]
    body = _bars("While RL ran", rl) + _bars("The whole run", whole) + _key(shown) + _table(rl)
    if len(runs) == 1 and runs[0].rl_phase is not None:
        charts = [_over_time(runs[0], role, name, runs[0].rl_phase) for role, name in SIDES]
        body += f'<div class="charts">{"".join(charts)}</div>'
    return body


def _bars(title: str, rows: Sequence[tuple[RunData, dict[ProcessRole, Account]]]) -> str:
    lines, many = [], " many" if len(rows) > 1 else ""
    for role, side in SIDES:
        for run, sides in rows:
            if (found := sides.get(role)) is None:
                continue
            name = side if len(rows) == 1 else f"{side}, {run.label}"
            cells = "".join(
                f'<i class="part-{part}" style="flex:{share:.5f}" title="{escape(PARTS[part])}: {share:.1%}"></i>'
                for part, share in found.fractions.items()
            )
            lines.append(f'<div class="row{many}"><span>{escape(name)}</span><div class="stack">{cells}</div></div>')
    return f"<h3>{escape(title)}</h3>{''.join(lines)}" if lines else ""


def _key(parts: Sequence[str]) -> str:
    shown = "".join(f'<span><i class="part-{part}"></i>{escape(PARTS[part])}</span>' for part in parts)
    return f'<p class="legend parts">{shown}</p>'


def _table(rows: Sequence[tuple[RunData, dict[ProcessRole, Account]]]) -> str:
    """Percentages while RL ran, and the total that they add up to."""
    columns = [(run, name, sides[role]) for role, name in SIDES for run, sides in rows if role in sides]
    if not columns:
        return ""
    heads = "".join(
        f"<th>{escape(name if len(rows) == 1 else f'{name}, {run.label}')}</th>" for run, name, _ in columns
    )
    lines = [f"<tr><th>While RL ran</th>{heads}</tr>"]
    for part, words in PARTS.items():
        shares = [side.fractions.get(part) for _, _, side in columns]
        if any(share is not None for share in shares):
            cells = "".join(f"<td>{'–' if share is None else f'{share:.1%}'}</td>" for share in shares)
            lines.append(f"<tr><td>{escape(words)}</td>{cells}</tr>")
    totals = "".join(f"<td>{side.wall_s:,.1f} s, {_count(side.processes)}</td>" for _, _, side in columns)
    lines.append(f"<tr><th>100% is</th>{totals}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _over_time(run: RunData, role: ProcessRole, name: str, window: Interval) -> str:
    gate = gate_spans(run.tracks)
    lives = [pieces(track, gate, window) for track in run.tracks if track.role == role]
    width = max(1, (window[1] - window[0]) // BINS)
    shares = {part: [0.0] * BINS for part in PARTS}
    for start, end, part in (piece for life in lives for piece in life):
        for index in range((start - window[0]) // width, min(BINS - 1, (end - window[0] - 1) // width) + 1):
            begin = window[0] + index * width
            shares[part][index] += max(0, min(end, begin + width) - max(start, begin))
    totals = [sum(shares[part][i] for part in PARTS) or 1.0 for i in range(BINS)]
    used = [
        (part, [value / total for value, total in zip(values, totals, strict=True)])
        for part, values in shares.items()
        if any(values)
    ]
    used.sort(key=lambda item: item[0] == UNACCOUNTED)
    minutes = [(i + 0.5) * width / 60e9 for i in range(BINS)]
    return areas(f"{name} over time", "Share of the side's time; colours as above", "minutes of RL", minutes, used)
