from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from slime_async.learner import feed as feed_module
from slime_async.learner.feed import HubFeed
from slime_async.protocol import Batch, Lease, Message, NotReady
from slime_async.transport.errors import ConnectionLost

INCARNATION = 3


class ScriptedHub:
    """Plays the client: keeps every lease, to be answered by hand or by ``answer`` as soon as it is asked."""

    def __init__(self, answer: Callable[[Lease], Message | Exception | None] = lambda lease: None) -> None:
        self.leases: list[Lease] = []
        self.futures: list[Future[Message]] = []
        self._answer = answer

    def begin(self, message: Message, timeout_s: float, *, retry: bool) -> Future[Message]:
        assert isinstance(message, Lease)
        assert timeout_s > message.wait_s
        self.leases.append(message)
        self.futures.append(Future())
        reply = self._answer(message)
        if isinstance(reply, Exception):
            self.futures[-1].set_exception(reply)
        elif reply is not None:
            self.futures[-1].set_result(reply)
        return self.futures[-1]

    @property
    def versions(self) -> list[int]:
        return [lease.train_version for lease in self.leases]


def make_feed(hub: ScriptedHub, last_version: int = 4, timeout_s: float = 60.0, check: Any = lambda: None) -> HubFeed:
    return HubFeed(hub, INCARNATION, last_version, timeout_s, 30.0, check)  # type: ignore[arg-type]


def ready(lease: Lease) -> Batch:
    return Batch(lease.train_version, ())


def test_batches_come_in_order_each_asked_for_once() -> None:
    hub = ScriptedHub(ready)
    feed = make_feed(hub)
    assert [feed.next_batch(v).train_version for v in range(4)] == [0, 1, 2, 3]
    assert hub.versions == [0, 1, 2, 3]
    assert {lease.incarnation for lease in hub.leases} == {INCARNATION}


def test_the_next_batch_is_asked_for_while_this_one_trains_but_none_beyond_the_last() -> None:
    hub = ScriptedHub(ready)
    feed = make_feed(hub, last_version=2)
    feed.next_batch(0)
    assert hub.versions == [0, 1]
    feed.next_batch(1)
    assert hub.versions == [0, 1]


def test_once_the_time_is_up_no_batch_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(feed_module.time, "monotonic", lambda: now)
    hub = ScriptedHub(ready)
    feed = HubFeed(hub, INCARNATION, 9, 60.0, 30.0, lambda: None, time_limit_s=10.0)  # type: ignore[arg-type]
    assert feed.next_batch(0) is not None
    now = 109.9
    assert feed.next_batch(1) is not None
    now = 110.0
    assert feed.next_batch(2) is None


def test_a_lease_that_was_not_ready_is_asked_again() -> None:
    answers: list[Message] = [NotReady("0 of 2 groups"), NotReady("1 of 2 groups"), Batch(0, ())]
    hub = ScriptedHub(lambda lease: answers.pop(0))
    assert make_feed(hub, last_version=1).next_batch(0) == Batch(0, ())
    assert hub.versions == [0, 0, 0]


def test_no_batch_in_time_raises_the_hubs_reason() -> None:
    feed = make_feed(ScriptedHub(lambda lease: NotReady("1 of 2 groups complete")), timeout_s=0.0)
    with pytest.raises(
        TimeoutError, match=r"no batch for version 0 .*lease_timeout_s.*hub says: 1 of 2 groups complete"
    ):
        feed.next_batch(0)


def test_a_lost_connection_is_raised_as_it_is() -> None:
    feed = make_feed(ScriptedHub(lambda lease: ConnectionLost("the hub fell silent")))
    with pytest.raises(ConnectionLost, match="fell silent"):
        feed.next_batch(0)


def test_what_fails_elsewhere_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise RuntimeError("the publisher failed")

    monkeypatch.setattr(feed_module, "CHECK_INTERVAL_S", 0.01)
    with pytest.raises(RuntimeError, match="the publisher failed"):
        make_feed(ScriptedHub(), check=check).next_batch(0)
