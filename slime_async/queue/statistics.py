"""The queue in numbers: one frozen snapshot, flat, for metrics, the live view and the watchdog."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from slime_async.queue.events import Accepted, TrajectoryMeta
from slime_async.queue.ledger import Ledger
from slime_async.queue.limits import QueueLimits
from slime_async.queue.records import BatchState
from slime_async.queue.reservations import ReservationTable
from slime_async.queue.staleness import BatchStaleness, two_sample_distance

LENGTH_WINDOW = 4096
"""Trajectories on either side of the comparison of lengths"""


def _window() -> deque[int]:
    return deque(maxlen=LENGTH_WINDOW)


class LeftOut(NamedTuple):
    """Of groups that no batch will ever hold."""

    stale_tokens: int
    """Sampled, in groups dropped whole as stale"""
    groups_filtered: int
    """For equal rewards, or by the judge"""
    tokens_filtered: int
    """Sampled in them"""


@dataclass(slots=True)
class Meters:
    """Counts that a restart of the hub resets."""

    last_moved: float = 0.0
    duplicates: int = 0
    unwanted: int = 0
    failures: int = 0
    last_failure: str = ""
    returned: int = 0
    masked_tokens: int = 0
    dropped_stale_tokens: int = 0
    filtered_groups: int = 0
    filtered_tokens: int = 0
    masked_trajectories: int = 0
    trained_stale_tokens: int = 0
    last_batch: BatchStaleness = field(default_factory=BatchStaleness)
    lengths_generated: deque[int] = field(default_factory=_window)
    lengths_trained: deque[int] = field(default_factory=_window)

    def moved(self, now: float) -> None:
        self.last_moved = now

    def delivered(self, meta: TrajectoryMeta) -> None:
        self.lengths_generated.append(meta.num_sampled)

    def leased(self, batch: Iterable[Accepted], staleness: BatchStaleness, min_version: int | None) -> None:
        """A new batch left the queue."""
        self.last_batch = staleness
        if min_version is None:
            self.trained_stale_tokens += staleness.stale_tokens
        else:
            self.masked_tokens += staleness.stale_tokens
            self.masked_trajectories += staleness.stale_trajectories
        for accepted in batch:
            spans = accepted.meta.tokens_by_version
            if spans and (min_version is None or spans[-1][0] >= min_version):
                self.lengths_trained.append(accepted.meta.num_sampled)


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """Trajectories unless a name says otherwise. Every accepted one is in exactly one of ``queued``, ``leased``,
    ``trained``, ``to_retrain``, ``durable`` and ``dropped``; counts of accepted ones are over the whole run."""

    published_version: int
    trained_version: int
    """Batches trained: the version that the next commit trains"""
    durable_version: int
    incarnation: int
    reserved: int
    """Granted, generation not begun"""
    running: int
    missing: int
    """Of open groups, not granted now"""
    open_groups: int
    complete_groups: int
    queued: int
    """Accepted, in open and complete groups"""
    leased: int
    trained: int
    """Not yet in a durable checkpoint"""
    to_retrain: int
    """Trained by a learner that died; kept for the next one"""
    durable: int
    dropped: int
    accepted: int
    pacing: int
    """Between grant and publication"""
    pacing_limit: int
    """(η + 1) · B"""
    held: int
    """What counts against ``held_limit``: open groups in full, complete and leased ones"""
    held_limit: int
    held_bytes: int
    """Queued and leased"""
    held_bytes_limit: int
    dropped_stale_groups: int
    dropped_failed_groups: int
    dropped_equal_rewards_groups: int
    dropped_filtered_groups: int
    filtered_groups: int
    """Of equal rewards or refused by the filter, since the hub started"""
    filtered_tokens: int
    """Sampled in them"""
    duplicates: int
    unwanted: int
    failures: int
    returned: int
    """Reservations of actors that died"""
    masked_tokens: int
    """In leased batches"""
    dropped_stale_tokens: int
    """Of groups that were dropped whole as stale"""
    masked_trajectories: int
    """All of whose tokens were masked"""
    trained_stale_tokens: int
    """Beyond η, trained and counted, with ``on_stale = "train"``"""
    evaluation_reserved: int
    evaluation_missing: int
    busy_actors: int
    """With training reservations"""
    staleness_mean: float
    """Token-weighted, of the last batch leased; so are the next four"""
    staleness_oldest: int
    staleness_newest: int
    staleness_in_generation: float
    staleness_in_queue: float
    length_generated_mean: float
    """Sampled tokens, of the last trajectories delivered"""
    length_trained_mean: float
    """Of the last trajectories leased with any token unmasked"""
    length_distance: float
    """Kolmogorov–Smirnov, of these two"""
    idle_s: float
    """Since anything moved"""

    def as_report(self) -> dict[str, bool | int | float | str]:
        """By name, as a ``protocol.Report``."""
        return asdict(self)


def collect(
    limits: QueueLimits,
    ledger: Ledger,
    reservations: ReservationTable,
    evaluations: ReservationTable,
    meters: Meters,
    now: float,
) -> QueueStatistics:
    """Take the snapshot; linear in the number of batches that are not durable."""
    batches = [record.state for record in ledger.batches.values()]
    last, totals = meters.last_batch, ledger.totals
    return QueueStatistics(
        published_version=ledger.published,
        trained_version=ledger.trained,
        durable_version=ledger.durable,
        incarnation=ledger.incarnation,
        reserved=reservations.held - reservations.running,
        running=reservations.running,
        missing=reservations.missing,
        open_groups=len(ledger.pending) - ledger.complete,
        complete_groups=ledger.complete,
        queued=ledger.queued,
        leased=limits.batch * ledger.leased,
        trained=limits.batch * batches.count(BatchState.TRAINED),
        to_retrain=limits.batch * batches.count(BatchState.TO_RETRAIN),
        durable=totals.get("durable", 0),
        dropped=totals.get("dropped_trajectories", 0),
        accepted=totals.get("accepted", 0),
        pacing=reservations.held + ledger.paced,
        pacing_limit=limits.pacing,
        held=ledger.held,
        held_limit=limits.queue_trajectories,
        held_bytes=ledger.queued_bytes + ledger.leased_bytes,
        held_bytes_limit=limits.queue_bytes,
        dropped_stale_groups=totals.get("dropped_stale_groups", 0),
        dropped_failed_groups=totals.get("dropped_failed_groups", 0),
        dropped_equal_rewards_groups=totals.get("dropped_equal_rewards_groups", 0),
        dropped_filtered_groups=totals.get("dropped_filtered_groups", 0),
        filtered_groups=meters.filtered_groups,
        filtered_tokens=meters.filtered_tokens,
        duplicates=meters.duplicates,
        unwanted=meters.unwanted,
        failures=meters.failures,
        returned=meters.returned,
        masked_tokens=meters.masked_tokens,
        dropped_stale_tokens=meters.dropped_stale_tokens,
        masked_trajectories=meters.masked_trajectories,
        trained_stale_tokens=meters.trained_stale_tokens,
        evaluation_reserved=evaluations.held,
        evaluation_missing=evaluations.missing,
        busy_actors=reservations.busy_actors,
        staleness_mean=last.mean,
        staleness_oldest=last.oldest,
        staleness_newest=last.newest,
        staleness_in_generation=last.in_generation,
        staleness_in_queue=last.in_queue,
        length_generated_mean=_mean(meters.lengths_generated),
        length_trained_mean=_mean(meters.lengths_trained),
        length_distance=two_sample_distance(meters.lengths_trained, meters.lengths_generated),
        idle_s=now - meters.last_moved,
    )


def _mean(values: deque[int]) -> float:
    return sum(values) / max(1, len(values))
