"""Where a learner gets its batches: from the hub, by lease. Where there are several ranks, see ``learner.fetch``.

The training loop is the same on every rank; what differs is the ``Feed`` it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol

from slime_async.protocol import Batch, Lease, Message, NotReady
from slime_async.transport.blocking import BlockingClient

LEASE_POLL_S = 5.0
"""How long one lease call stays open; a new one follows at once, so this bounds only how late a failure is noticed."""
CHECK_INTERVAL_S = 1.0
"""How often a waiting loop looks whether something else has failed."""


class Feed(Protocol):
    def next_batch(self, train_version: int) -> Batch | None:
        """The batch that turns ``train_version`` into ``train_version + 1``; the same one on every rank.

        None: there is no time for another.
        """


class HubFeed:
    """Rank 0: leases from the hub, one batch ahead, so that the transfer hides behind the training step. Without
    ``payloads`` the batches only say what is stored of each trajectory.

    ``patience_s`` is how long one answer may take beyond its own wait: a hub that is started again needs some. Nothing
    is begun once ``time_limit_s`` has passed since the first batch was asked for. Raises ``TimeoutError`` when no batch
    came within ``timeout_s``, naming what the hub says was missing.
    """

    def __init__(
        self,
        client: BlockingClient,
        incarnation: int,
        last_version: int,
        timeout_s: float,
        patience_s: float,
        check: Callable[[], None],
        payloads: bool = True,
        time_limit_s: float | None = None,
    ) -> None:
        self._client = client
        self._payloads = payloads
        self._incarnation = incarnation
        self._last_version = last_version
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._check = check
        self._time_limit_s = time_limit_s
        self._began_s: float | None = None
        self._ahead: Future[Message] | None = None
        self._ahead_version = -1

    def next_batch(self, train_version: int) -> Batch | None:
        if self._time_is_up():
            return None
        deadline = time.monotonic() + self._timeout_s
        reason = "no answer from the hub"
        while True:
            if self._ahead is None or self._ahead_version != train_version:
                self._ask(train_version)
            reply = self._await_reply()
            if isinstance(reply, Batch):
                if train_version + 1 < self._last_version:
                    self._ask(train_version + 1)
                return reply
            if isinstance(reply, NotReady):
                reason = reply.reason
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no batch for version {train_version} within {self._timeout_s:.0f} s "
                    f"(learner.lease_timeout_s); the hub says: {reason}"
                )

    def _time_is_up(self) -> bool:
        now = time.monotonic()
        self._began_s = now if self._began_s is None else self._began_s
        return self._time_limit_s is not None and now - self._began_s >= self._time_limit_s

    def _ask(self, train_version: int) -> None:
        lease = Lease(self._incarnation, train_version, LEASE_POLL_S, self._payloads)
        self._ahead = self._client.begin(lease, LEASE_POLL_S + self._patience_s, retry=True)
        self._ahead_version = train_version

    def _await_reply(self) -> Message:
        """The open lease's answer, unless something else fails meanwhile."""
        assert self._ahead is not None
        while not wait([self._ahead], CHECK_INTERVAL_S).done:
            self._check()
        answered, self._ahead = self._ahead, None
        return answered.result()
