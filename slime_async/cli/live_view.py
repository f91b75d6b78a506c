"""The live view as lines of text, fitted to any window: pure, from a ``LiveState`` to what is on the screen.

A section is a title and a few lines. Wide windows show two columns; where lines are short, the least important sections
go first, and what is too long ends in "…".
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from slime_async.cli.live_state import LiveState
from slime_async.cli.progress import PHASES
from slime_async.telemetry.accounting import COMPUTING, PARTS, Account

TWO_COLUMNS_FROM = 100
"""Cells of width"""
GAP = 3
LABEL = 11
SPARKS = "▁▂▃▄▅▆▇█"
BAR_MAX = 40
SHARES_ROOM = 10
"""Cells that the words below a bar may be longer than it"""
SILENT_S = 5.0
"""A peer not heard of for so long is shown in red"""
COLOURS = {COMPUTING: "green", "queue_empty": "red", "weight_sync": "magenta", "starting": "bright_black"}
"""Of parts of time; all others are yellow"""


@dataclass(frozen=True, slots=True)
class Section:
    """Some lines that belong together; ``rank`` 0 is what people need most."""

    rank: int
    title: str
    lines: list[Text]

    @property
    def height(self) -> int:
        return len(self.lines) + 1


def screen(state: LiveState, width: int, height: int) -> list[Text]:
    """What to show in a window of this size: at most ``height`` lines of at most ``width`` cells."""
    head = _head(state, width)
    chosen = [section for section in _sections(state, width) if section.lines]
    columns = 2 if width >= TWO_COLUMNS_FROM else 1
    while chosen and len(head) + _rows(chosen, columns) > height:
        chosen.remove(max(chosen, key=lambda section: section.rank))
    body = _side_by_side(chosen, width) if columns == 2 else [line for s in chosen for line in _whole(s)]
    lines = (head + body)[: max(1, height)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _rows(sections: Sequence[Section], columns: int) -> int:
    if columns == 1:
        return sum(section.height for section in sections)
    return max((sum(section.height for section in column) for column in _split(sections)), default=0)


def _split(sections: Sequence[Section]) -> tuple[list[Section], list[Section]]:
    """In order, so that both columns are about as long."""
    total, left = sum(section.height for section in sections), list[Section]()
    for section in sections:
        if sum(s.height for s in left) + section.height / 2 > total / 2:
            break
        left.append(section)
    return left, list(sections[len(left) :])


def _whole(section: Section) -> list[Text]:
    return [Text(section.title, style="bold cyan"), *section.lines]


def _side_by_side(sections: Sequence[Section], width: int) -> list[Text]:
    cells = (width - GAP) // 2
    left, right = ([line for section in column for line in _whole(section)] for column in _split(sections))
    rows = []
    for i in range(max(len(left), len(right))):
        row = left[i].copy() if i < len(left) else Text()
        row.truncate(cells, overflow="ellipsis", pad=True)
        other = right[i].copy() if i < len(right) else Text()
        other.truncate(cells, overflow="ellipsis")
        rows.append(row + Text(" " * GAP) + other)
    return rows


def _head(state: LiveState, width: int) -> list[Text]:
    """Name, phase and progress: shown in every window."""
    name = state.status.run_id if state.status is not None else "connecting"
    title = Text.assemble((name, "bold"), "  ", (PHASES.get(state.phase, state.phase), "yellow"), "  ")
    title.append(_clock(state.now_s - state.begun_s), style="bright_black")
    pace = state.pace
    if not pace.steps:
        return [title]
    text = f" {pace.step}/{pace.steps}"
    left = pace.left_s(state.now_s)
    text += f"  {_clock(left)} left" if left is not None else ""
    room = max(0, min(width - cell_len(text), 2 * BAR_MAX))
    return [title, bar(pace.step / pace.steps, room, "green") + Text(text)]


def _sections(state: LiveState, width: int) -> list[Section]:
    cells = (width - GAP) // 2 if width >= TWO_COLUMNS_FROM else width
    room = max(4, min(BAR_MAX, cells - LABEL - 14))
    return [
        Section(0, "Learning", _learning(state, room)),
        Section(2, "Speed", _speed(state)),
        Section(3, "Staleness", _staleness(state, room)),
        Section(4, "Queue", _queue(state, room)),
        Section(1, "Waiting, last minute", _waiting(state, room)),
        Section(6, "Engines", _engines(state)),
        Section(5, "Warnings", _warnings(state)),
    ]


def _learning(state: LiveState, room: int) -> list[Text]:
    report, lines = state.learner, []
    if state.rewards:
        lines.append(_row("reward", f"{state.rewards[-1]:.3f}  ") + Text(sparkline(list(state.rewards), room), "green"))
    elif "loss" in report:
        lines.append(_row("loss", f"{float(report['loss']):.4f}"))
    for name, value in state.accuracy.items():
        lines.append(_row("accuracy", f"{value:.1%} {name.replace('_', ' ')}"))
    if "mismatch/ess" in report:
        ess, largest = _number(report, "mismatch/ess", ".3f"), _number(report, "mismatch/ratio_max", ".3g")
        lines.append(_row("π_prox/μ", f"ESS {ess}, largest ratio {largest}"))
    return lines


def _speed(state: LiveState) -> list[Text]:
    lines = []
    if state.generated_per_s is not None and state.actors:
        lines.append(_row("generate", f"{_short(state.generated_per_s)} tokens/s"))
    if "learner_tokens_per_s" in state.learner:
        lines.append(_row("train", f"{_short(float(state.learner['learner_tokens_per_s']))} tokens/s"))
    if "publish_s" in state.learner:
        paused = _number(state.learner, "pause_to_resume_s", ".3f")
        lines.append(_row("publish", f"{_number(state.learner, 'publish_s', '.3f')} s, engines paused {paused} s"))
    return lines


def _staleness(state: LiveState, room: int) -> list[Text]:
    report, bound = state.learner, state.config.staleness.max_staleness
    tokens = {int(name.partition("/")[2]): float(n) for name, n in report.items() if name.startswith("staleness/")}
    if not tokens:
        return []
    mean, largest = _number(report, "staleness_mean", ".2f"), _number(report, "staleness_max", ".0f")
    lines = [_row("trained", f"mean {mean}, largest {largest}, bound {bound}")]
    total = sum(tokens.values()) or 1.0
    for age in sorted(tokens):
        style = "green" if age <= bound else "red"
        share = tokens[age] / total
        lines.append(Text(f"{f'{age} old':<{LABEL}}") + bar(share, room, style) + Text(f" {share:.0%}"))
    return lines


def _queue(state: LiveState, room: int) -> list[Text]:
    queue, lines = state.queue, []
    for label, name in (("held", "held"), ("under way", "pacing")):
        limit = int(queue.get(f"{name}_limit", 0))
        if limit:
            count = int(queue.get(name, 0))
            lines.append(Text(f"{label:<{LABEL}}") + bar(count / limit, room, "blue") + Text(f" {count:,}/{limit:,}"))
    if queue:
        lines.append(_row("running", f"{queue.get('running', 0)} with {queue.get('busy_actors', 0)} actors"))
    return lines


def _waiting(state: LiveState, room: int) -> list[Text]:
    lines = []
    if state.waiting:
        lines.append(_row("now", f"{state.waiting}, for {_clock(state.now_s - state.waiting_since_s)}"))
    for role, label in (("learner", "learner"), ("actor", "actors")):
        if (side := state.sides.get(role)) is not None:  # type: ignore[call-overload]
            lines.append(Text(f"{label:<{LABEL}}") + _stack(side, room))
            lines += [Text(" " * LABEL + line, style="bright_black") for line in _shares(side, room + SHARES_ROOM)]
    return lines


def _stack(side: Account, room: int) -> Text:
    """One bar, cut into what the side did in the last minute."""
    stack, at, drawn = Text(), 0.0, 0
    for part, share in side.fractions.items():
        at += share
        cells = round(at * room) - drawn
        stack.append("█" * cells, style=COLOURS.get(part, "yellow"))
        drawn += cells
    return stack


def _shares(side: Account, room: int) -> list[str]:
    """The same in words, the largest first, in lines of about ``room`` cells."""
    shares = sorted(side.fractions.items(), key=lambda item: -item[1])
    words = [f"{PARTS[part].partition(':')[0].lower()} {share:.0%}" for part, share in shares if share >= 0.01]
    return textwrap.wrap(", ".join(words), room)


def _engines(state: LiveState) -> list[Text]:
    published = int(state.queue.get("published_version", -1))
    return [
        Text.assemble(
            f"{peer.name:<{LABEL}} ",
            (f"v{peer.report.get('weight_version', '?')}", "green" if _current(peer.report, published) else "yellow"),
            f"  {peer.report.get('running_requests', 0)} running, {peer.report.get('waiting_requests', 0)} waiting, ",
            f"{_short(float(peer.report.get('actor_tokens_per_s', 0.0)))} tokens/s  ",
            (f"heard {peer.silent_s:.0f} s ago", "red" if peer.silent_s > SILENT_S else "bright_black"),
        )
        for peer in state.actors
    ]


def _current(report: object, published: int) -> bool:
    return isinstance(report, dict) and report.get("weight_version") == published


def _warnings(state: LiveState) -> list[Text]:
    return [
        Text.assemble(
            (time.strftime("%H:%M:%S ", time.localtime(warning["at_s"])), "bright_black"),
            (f"{warning['who']}: ", "yellow"),
            str(warning["text"]).replace("\n", " "),
        )
        for warning in reversed(state.warnings)
    ]


def bar(share: float, cells: int, style: str) -> Text:
    """A bar of ``cells`` cells, ``share`` of them filled, to an eighth of one."""
    eighths = round(min(1.0, max(0.0, share)) * cells * 8)
    full, rest = divmod(eighths, 8)
    filled = "█" * full + ("" if not rest else " ▏▎▍▌▋▊▉"[rest])
    return Text.assemble((filled, style), ("░" * (cells - cell_len(filled)), "bright_black"))


def sparkline(values: Sequence[float], cells: int) -> str:
    """The last values as a curve of ``cells`` cells at most; neighbours are averaged where there are more."""
    if not values or cells <= 0:
        return ""
    size = -(-len(values) // cells)
    means = [_mean(values[start : start + size]) for start in range(0, len(values), size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int((mean - low) / span * len(SPARKS)))] for mean in means)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _row(label: str, text: str) -> Text:
    return Text(f"{label:<{LABEL}}{text}")


def _number(report: object, name: str, form: str) -> str:
    value = report.get(name) if isinstance(report, dict) else None
    return format(value, form) if isinstance(value, int | float) else "–"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    """``42 s``, ``3:07``, ``2:03:07``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
