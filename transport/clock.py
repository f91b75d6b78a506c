"""How far this process's clock is from the hub's; see ``slime_async.telemetry.clocks``."""

from __future__ import annotations

import asyncio
import logging
import time

from slime_async.protocol import GetTime, HubTime, Message
from slime_async.telemetry.clocks import INTERVAL_S, SAMPLES, ClockSample, clock_sample
from slime_async.telemetry.spans import SpanRecorder
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.client import HubClient
from slime_async.transport.errors import DeadlineExceeded

log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""A hub too busy to answer costs a measurement; whether it lives is for the heartbeats to say."""


async def keep_aligned(client: HubClient, recorder: SpanRecorder) -> None:
    """Measure now and every minute, for ever."""
    while True:
        try:
            samples = []
            for _ in range(SAMPLES):
                sent_ns = recorder.now_ns()
                reply = await client.call(GetTime(), TIMEOUT_S, retry=True)
                samples.append(_sample(sent_ns, reply, recorder.now_ns()))
            recorder.align(_best(samples))
        except DeadlineExceeded as late:
            log.info("the hub's clock was not read: %s", late)
        await asyncio.sleep(INTERVAL_S)


class ClockKeeper:
    """The same for synchronous code, which calls ``keep`` now and then."""

    def __init__(self, client: BlockingClient, recorder: SpanRecorder) -> None:
        self._client = client
        self._recorder = recorder
        self._due = 0.0

    def keep(self) -> None:
        """Measure if a minute has passed; takes a few round trips, milliseconds."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + INTERVAL_S
        try:
            self._recorder.align(_best([self._measure() for _ in range(SAMPLES)]))
        except DeadlineExceeded as late:
            log.info("the hub's clock was not read: %s", late)

    def _measure(self) -> ClockSample:
        sent_ns = self._recorder.now_ns()
        reply = self._client.call(GetTime(), TIMEOUT_S, retry=True)
        return _sample(sent_ns, reply, self._recorder.now_ns())


def _sample(sent_ns: int, reply: Message, received_ns: int) -> ClockSample:
    assert isinstance(reply, HubTime), reply
    return clock_sample(sent_ns, reply.time_ns, received_ns)


def _best(samples: list[ClockSample]) -> ClockSample:
    """The one with the shortest round trip."""
    return min(samples, key=lambda sample: sample.error_ns)
