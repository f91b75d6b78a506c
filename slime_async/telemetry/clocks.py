"""One time for all processes of a run: the hub's.

Every process ties its monotonic clock to wall time once. What is left between machines is measured against the hub by
round trips, as NTP does: the hub answers with its own time, which lies somewhere between sending and receiving.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLES = 5
"""Round trips per measurement; the fastest has the smallest error"""
INTERVAL_S = 60.0
"""Between measurements: quartz drifts by some 3 ms in that time"""


@dataclass(frozen=True, slots=True)
class ClockSample:
    """One measurement; nanoseconds."""

    at_ns: int
    """When, by this process"""
    offset_ns: int
    """Hub's time − this process's"""
    error_ns: int
    """Half of the round trip: how wrong ``offset_ns`` can be at most"""


def clock_sample(sent_ns: int, hub_ns: int, received_ns: int) -> ClockSample:
    """From one round trip; sent and received by this process's clock, the middle by the hub's."""
    middle = (sent_ns + received_ns) // 2
    return ClockSample(middle, hub_ns - middle, (received_ns - sent_ns + 1) // 2)


def offset_at(samples: Sequence[ClockSample], time_ns: int) -> int:
    """What to add to this process's time to get the hub's; samples ascend in time, between two it is interpolated.

    An offset within its own error is taken for 0: processes of one machine share a clock, and a correction by noise
    would only bend it.
    """
    if not samples:
        return 0
    after = bisect_right(samples, time_ns, key=lambda sample: sample.at_ns)
    before = samples[max(0, after - 1)]
    if after in (0, len(samples)):
        return _known(before)
    next_ = samples[after]
    share = (time_ns - before.at_ns) / max(1, next_.at_ns - before.at_ns)
    return round(_known(before) + share * (_known(next_) - _known(before)))


def _known(sample: ClockSample) -> int:
    return sample.offset_ns if abs(sample.offset_ns) > sample.error_ns else 0
