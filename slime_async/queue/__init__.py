"""The staleness-bounded queue as a pure state machine: no I/O, no clock of its own.

==================  ==========================================================================
``queue``           ``TrajectoryQueue``: every transition, decided here; start reading here
``events``          what is durable, as events; ``ledger`` is their fold, ``snapshot`` the fold as one event
``reservations``    who generates what: volatile
``gate``            pacing (``admission``) and backpressure
``selection``       the staleness bound when a batch is leased
``tasks``           the order of tasks; ``shuffle`` is its permutation
``evaluations``     tasks played beside training
``staleness``       the measured staleness, and the mask the learner uses
``statistics``      the frozen snapshot for metrics; ``explain`` says it in words
``limits``          the bounds, and which of them would deadlock
==================  ==========================================================================
"""

from slime_async.queue.events import Event, Snapshot, TrajectoryMeta, from_plain, to_plain
from slime_async.queue.limits import QueueLimits
from slime_async.queue.queue import TrajectoryQueue
from slime_async.queue.records import Exhausted, LeasedBatch, Waiting
from slime_async.queue.staleness import BatchStaleness, stale_token_mask
from slime_async.queue.statistics import QueueStatistics
from slime_async.queue.tasks import TaskStream

__all__ = [
    "BatchStaleness",
    "Event",
    "Exhausted",
    "LeasedBatch",
    "QueueLimits",
    "QueueStatistics",
    "Snapshot",
    "TaskStream",
    "TrajectoryMeta",
    "TrajectoryQueue",
    "Waiting",
    "from_plain",
    "stale_token_mask",
    "to_plain",
]
