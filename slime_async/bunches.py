"""How many requests enter an engine together: the rule that actors and the simulator share.

A prefill holds up everything that decodes, and one of a few prompts takes about as long as one of a single prompt. So
where answers end one by one, an engine that lets the next prompt in at once spends as much time on prefill as on
decoding. In bunches of a fraction f of those inside, there are 1 / f prefills in the time that an answer takes, however
many requests are inside, and a request waits f / 2 of that time: as long as it takes until so many have ended.

Those for which the engine has no room wait outside, too. In its own queue they would take each place as it becomes
free, one by one.
"""

from __future__ import annotations

WEIGHT = 1 / 32
"""Of the latest duration in their mean"""
PATIENCE = 2.0
"""Times as long as a bunch takes to gather where answers end evenly: after that, no more are likely to come"""


class Bunches:
    """The rule for one engine, and how long requests take in it, which sets how long others wait."""

    def __init__(self, fraction: float, wait_s: float) -> None:
        self._fraction = fraction
        self._wait_s = wait_s
        self._mean_s = 0.0

    def size(self, inside: int) -> int:
        """Requests that have to wait until they enter an engine with ``inside`` others; 1 where nobody waits."""
        return max(1, int(inside * self._fraction))

    def entering(self, waiting: int, inside: int, room: float) -> int:
        """How many of those that wait enter an engine with ``inside`` others and ``room`` for so many more."""
        ready = int(min(waiting, room))
        return ready if ready >= self.size(inside) or self.patience_s <= 0 else 0

    @property
    def patience_s(self) -> float:
        """After which they enter, though they are fewer. 0 before any request has ended."""
        return min(self._wait_s, PATIENCE * self._fraction * self._mean_s)

    def ended(self, duration_s: float) -> None:
        """A request was inside for so long."""
        self._mean_s += (duration_s - self._mean_s) * (WEIGHT if self._mean_s else 1.0)
