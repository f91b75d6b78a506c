"""Where the time of each side went: wall time = computing + waiting by cause + what no span accounts for.

Each instant of a process belongs to the first row below whose span covers it; spans are those of
``slime_async.telemetry.spans``.

======================  ============  ===========================================================================
part                    span          of an actor
======================  ============  ===========================================================================
computing               generate      the engine samples tokens
weight_sync             weight_sync   paused: new weights are on their way into the engine
starting                starting      the process loads, or waits for its first weights
environment             episode       episodes are open, but none is in the engine: environments and rewards compute
delivery                deliver       all that is open waits for the hub to acknowledge
admission_staleness     idle          nothing granted: (η + 1) batches are under way
admission_queue_full    idle          nothing granted: the queue's bound in trajectories or bytes
admission               idle          nothing granted otherwise: no version published, no tasks left, or on its way
======================  ============  ===========================================================================

======================  =============================  ==========================================================
part                    span                           of a learner's rank
======================  =============================  ==========================================================
computing               train, snapshot, supervised,   forward, backward, optimizer, the copy of the weights, and the
                        log                            step's metrics
queue_empty             lease                          no complete batch is there
commit                  commit                         the hub has not acknowledged
weight_sync             publish_stall, wait_engines    a publication is not done
evaluation              evaluate                       actors play held-out tasks
checkpoint              save                           weights go to disk
starting                starting                       the process loads and builds its model
======================  =============================  ==========================================================

Both have ``unaccounted``: what is left, and below 1% where nothing is wrong. A side's account is the sum over its
processes, from each one's first span to its last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slime_async.telemetry.intervals import Interval, difference, intersection, union
from slime_async.telemetry.overlap import rl_phase
from slime_async.telemetry.spans import ProcessRole, Span, Track

COMPUTING = "computing"
UNACCOUNTED = "unaccounted"
PRECEDENCE: dict[ProcessRole, tuple[tuple[str, str], ...]] = {
    "actor": (
        ("generate", COMPUTING),
        ("weight_sync", "weight_sync"),
        ("starting", "starting"),
        ("episode", "environment"),
        ("deliver", "delivery"),
        ("idle", "admission"),
    ),
    "learner": (
        ("train", COMPUTING),
        ("snapshot", COMPUTING),
        ("supervised", COMPUTING),
        ("log", COMPUTING),
        ("lease", "queue_empty"),
        ("commit", "commit"),
        ("publish_stall", "weight_sync"),
        ("wait_engines", "weight_sync"),
        ("evaluate", "evaluation"),
        ("checkpoint", "checkpoint"),
        ("save", "checkpoint"),
        ("starting", "starting"),
    ),
}
"""(span, part) by role, the first that covers an instant counts; ``admission`` is then split by the hub's gate"""
ADMISSION_CAUSES = {"staleness": "admission_staleness", "queue_full": "admission_queue_full"}
"""The hub's ``gate`` span by its cause → part"""
PARTS: dict[str, str] = {
    COMPUTING: "Computing",
    "queue_empty": "Queue empty: no complete batch",
    "admission_staleness": "Admission: staleness bound",
    "admission_queue_full": "Admission: queue full",
    "admission": "Admission: nothing granted",
    "weight_sync": "Weight sync",
    "environment": "Environments and rewards",
    "delivery": "Delivery to the hub",
    "commit": "Commit at the hub",
    "evaluation": "Evaluation",
    "checkpoint": "Checkpoint",
    "starting": "Starting",
    UNACCOUNTED: "Unaccounted",
}
"""Every part in words, in the order in which they are shown"""

Piece = tuple[int, int, str]
"""(start, end, part): nanoseconds, half-open"""


@dataclass(frozen=True, slots=True)
class Account:
    """One side's time, or one process's."""

    processes: int
    wall_s: float
    """Summed over the processes"""
    seconds: dict[str, float]
    """By part, those of 0 left out; they add up to ``wall_s``"""

    @property
    def fractions(self) -> dict[str, float]:
        """By part; they add up to 1."""
        return {part: seconds / self.wall_s for part, seconds in self.seconds.items()}


def pieces(track: Track, gate: Iterable[Span] = (), window: Interval | None = None) -> list[Piece]:
    """The life of one process, or what of it lies in ``window``, cut into parts: disjoint, ascending, without holes.

    ``gate`` are the hub's spans of that name.
    """
    if not track.spans:
        return []
    life = (min(span.start_ns for span in track.spans), max(span.end_ns for span in track.spans))
    left = intersection([life], [life if window is None else window])
    found: list[Piece] = []
    for name, part in PRECEDENCE.get(track.role, ()):
        taken = intersection(track.named(name), left)
        left = difference(left, taken)
        found += _split_admission(taken, gate) if part == "admission" else [(a, b, part) for a, b in taken]
    return sorted(found + [(start, end, UNACCOUNTED) for start, end in left])


def account(tracks: Sequence[Track], role: ProcessRole, window: Interval | None = None) -> Account | None:
    """One side's account; None when none of its processes lived in ``window``."""
    gate = gate_spans(tracks)
    lives = [cut for track in tracks if track.role == role and (cut := pieces(track, gate, window))]
    seconds: dict[str, float] = {}
    for start, end, part in (piece for life in lives for piece in life):
        seconds[part] = seconds.get(part, 0.0) + (end - start) / 1e9
    ordered = {part: seconds[part] for part in PARTS if part in seconds}
    return Account(len(lives), sum(ordered.values()), ordered) if ordered else None


def accounts(tracks: Sequence[Track], window: Interval | None = None) -> dict[ProcessRole, Account]:
    """Both sides, those that there are."""
    found = {role: account(tracks, role, window) for role in PRECEDENCE}
    return {role: side for role, side in found.items() if side is not None}


def rl_accounts(tracks: Sequence[Track]) -> dict[ProcessRole, Account]:
    """Both sides while RL ran: from the first lease to the last commit. Empty before there is one."""
    phase = rl_phase([span for track in tracks for span in track.spans])
    return accounts(tracks, phase) if phase else {}


def gate_spans(tracks: Iterable[Track]) -> list[Span]:
    """When the hub granted nothing, and why."""
    return [span for track in tracks if track.role == "hub" for span in track.spans if span.name == "gate"]


def _split_admission(idle: Sequence[Interval], gate: Iterable[Span]) -> list[Piece]:
    left, found = union(idle), list[Piece]()
    closed = list(gate)
    for cause, part in ADMISSION_CAUSES.items():
        taken = intersection(left, [(s.start_ns, s.end_ns) for s in closed if s.args.get("cause") == cause])
        left = difference(left, taken)
        found += [(start, end, part) for start, end in taken]
    return found + [(start, end, "admission") for start, end in left]


def largest_wait(side: Account) -> tuple[str, float] | None:
    """(part, fraction) of what a side waited for most; None where it never waited."""
    waits = {part: share for part, share in side.fractions.items() if part not in (COMPUTING, UNACCOUNTED)}
    return max(waits.items(), key=lambda item: item[1]) if waits else None
