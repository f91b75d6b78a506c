"""How many trajectories may be granted now: the pacing half of the staleness control, as one formula."""

from __future__ import annotations


def capacity(
    *, version: int, batch: int, max_staleness: int, accepted: int, running: int, max_concurrent: int | None = None
) -> int:
    """Trajectories that may start now, the smaller of two rooms; it can be negative.

    * staleness: ``(η + v + 1) · B − (accepted + running)``: when everything granted so far is trained in order, the
      last of it trains version ``v + η``;
    * concurrency: ``max_concurrent − running``.

    ``version`` v is the published one, ``batch`` B counts trajectories, ``accepted`` counts over the whole run and
    leaves out what was dropped or failed. The rule is AReaL's (arXiv 2505.24298, section 5.1).
    """
    room = (max_staleness + version + 1) * max(1, batch) - (accepted + running)
    if max_concurrent is None:
        return room
    return min(max(1, max_concurrent) - running, room)
