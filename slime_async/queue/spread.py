"""Who gets what is granted: groups at a time, each to the actor with the most room, so that a batch spreads out."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from slime_async.protocol import Reservation
from slime_async.queue.queue import TrajectoryQueue


def spread_grants(
    queue: TrajectoryQueue, free_slots: Mapping[str, int], slots: Mapping[str, int], now: float
) -> dict[str, list[Reservation]]:
    """Grant all that may be granted now, by actor; of its ``slots`` each has ``free_slots`` free.

    A group stays together where an actor has room for it: its samples share a prompt.
    """
    size = queue.limits.group_size
    by_room = [(-free, name) for name, free in free_slots.items() if free > 0]
    heapq.heapify(by_room)
    granted: dict[str, list[Reservation]] = {}
    while by_room:
        room, name = heapq.heappop(by_room)
        wanted = min(-room, size)
        reservations = queue.grant(name, wanted, now, slots[name])
        if reservations:
            granted.setdefault(name, []).extend(reservations)
        if len(reservations) == wanted < -room:
            heapq.heappush(by_room, (room + wanted, name))
        elif len(reservations) < wanted and not queue.evaluations_wait:
            break  # admission is closed, for everybody
    return granted
