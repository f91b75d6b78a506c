"""What ``slime-async top`` shows: pure, from statuses of the hub to a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slime_async.cli.progress import TokenRate, progress_line
from slime_async.protocol import PeerStatus, Report, RunStatus

SILENT_S = 5.0
"""A role that was not heard of for so long is shown in red"""
ERRORS_SHOWN = 8
COLUMNS = ("role", "process", "host", "version", "weights", "rate", "running", "waiting", "heard", "warnings")
RIGHT = frozenset({"weights", "rate", "running", "waiting", "heard", "warnings"})


@dataclass(slots=True)
class Overview:
    """Updated with each status."""

    max_staleness: int | None = None
    status: RunStatus | None = None
    generated_per_s: float | None = None
    _rate: TokenRate = field(default_factory=TokenRate)

    def update(self, status: RunStatus, now_s: float) -> None:
        self.status = status
        self.generated_per_s = self._rate.update(status.peers, now_s)


def table(overview: Overview) -> RenderableType:
    """Progress, queue, one row per role, and the last warnings, the newest first."""
    status = overview.status
    if status is None:
        return Text("connecting")
    progress = progress_line(status, overview.max_staleness, overview.generated_per_s)
    roles = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        roles.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold")
    roles.add_row(*_hub_row(status))
    for peer in sorted(status.peers, key=lambda peer: (peer.role != "learner", peer.role, peer.name)):
        style = "red" if peer.silent_s > SILENT_S else ""
        roles.add_row(*_row(peer), style=style)
    return Group(
        Text.assemble((status.run_id, "bold"), "  ", progress),
        Text(_queue_line(status.queue)),
        roles,
        *_errors(status),
    )


def _queue_line(queue: Report) -> str:
    counts = ", ".join(f"{queue.get(name, 0)} {name}" for name in ("queued", "leased", "running", "reserved"))
    old, waiting = (float(queue.get(f"staleness_in_{where}", 0)) for where in ("generation", "queue"))
    return (
        f"queue: {counts}; pacing {queue.get('pacing', 0)}/{queue.get('pacing_limit', 0)}; "
        f"{int(queue.get('held_bytes', 0)) / 2**20:.1f} MiB; {queue.get('failures', 0)} failed, "
        f"{queue.get('returned', 0)} returned; staleness {old:.2f} in generation, {waiting:.2f} in queue"
    )


def _hub_row(status: RunStatus) -> tuple[str, ...]:
    about = status.hub
    version = status.queue.get("published_version", -1)
    return ("hub", "hub", *_where(about), str(version), "", "", "", "now", str(about.get("warnings", "")))


def _row(peer: PeerStatus) -> tuple[str, ...]:
    report = peer.report
    rate = report.get("actor_tokens_per_s" if peer.role == "actor" else "learner_tokens_per_s")
    weights = report.get("weight_version" if peer.role == "actor" else "step", "")
    return (
        peer.role,
        peer.name,
        *_where(report),
        str(weights),
        f"{float(rate):,.0f} tok/s" if isinstance(rate, int | float) else "",
        str(report.get("running_requests", "")),
        str(report.get("waiting_requests", "")),
        f"{peer.silent_s:.1f} s",
        str(report.get("warnings", "")),
    )


def _where(report: Report) -> tuple[str, str]:
    return str(report.get("host", "")), str(report.get("release", ""))


def _errors(status: RunStatus) -> Iterator[Text]:
    reports = [("hub", status.hub), *((peer.name, peer.report) for peer in status.peers)]
    told = [
        (float(report["last_warning_s"]), name, str(report["last_warning"]))
        for name, report in reports
        if "last_warning_s" in report
    ]
    if told:
        yield Text("last warnings", style="bold")
    for age_s, name, text in sorted(told)[:ERRORS_SHOWN]:
        yield Text(f"{age_s:7.0f} s ago  {name}: {text}", style="yellow")
