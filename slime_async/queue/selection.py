"""The bound at consumption: which groups train a version, and which have become too old for it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from slime_async.queue.ledger import Ledger
from slime_async.queue.limits import QueueLimits
from slime_async.queue.records import Group


@dataclass(frozen=True, slots=True)
class Selection:
    groups: tuple[int, ...]
    """A whole batch, in the order of grants, or empty"""
    stale: tuple[int, ...]
    """To be dropped, whether or not there is a batch"""


def select(ledger: Ledger, limits: QueueLimits, train_version: int) -> Selection:
    """The oldest groups that may train ``train_version``.

    ======  ===========================================================================================
    mask    complete groups; those of which the mask would leave no token are stale
    drop    complete groups; those with any token older than η are stale
    wait    the first groups in the order of grants, once all of them are complete; nothing is stale
    train   complete groups; nothing is stale
    ======  ===========================================================================================

    Looks at each group a few times between its grant and its lease: nothing happens while less than a batch is
    complete, and otherwise each look ends in a lease or a drop, ``wait`` excepted, whose look ends at the first
    incomplete group.
    """
    if ledger.complete < limits.groups_per_batch:
        return Selection((), ())
    if limits.on_stale == "wait":
        head = list(islice(ledger.pending.items(), limits.groups_per_batch))
        ready = all(ledger.ready(group) for _, group in head)
        return Selection(tuple(serial for serial, _ in head) if ready else (), ())
    chosen: list[int] = []
    stale: list[int] = []
    for serial, group in ledger.pending.items():
        if not ledger.ready(group):
            continue
        (stale if _is_stale(group, limits, train_version) else chosen).append(serial)
        if len(chosen) == limits.groups_per_batch:
            return Selection(tuple(chosen), tuple(stale))
    return Selection((), tuple(stale))


def _is_stale(group: Group, limits: QueueLimits, train_version: int) -> bool:
    min_version = limits.min_version(train_version)
    deciding = group.oldest_version if limits.on_stale == "drop" else group.newest_version
    return min_version is not None and deciding is not None and deciding < min_version
