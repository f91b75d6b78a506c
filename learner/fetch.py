"""Several ranks: each data-parallel rank fetches its own trajectories from the hub, over its own connection.

::

    rank 0        Lease without payloads ──► head: ids, lengths, versions, rewards, stores ──► all ranks
    every leader  FollowLease ──► the same plan ──► Fetch its share ─┐  one batch ahead, while the last one trains
    all ranks     columns that training reads everywhere ◄───────────┘  from each leader to all

A *leader* is the first rank of a data-parallel rank; its tensor-, pipeline- and context-parallel peers fetch nothing:
each payload leaves the hub once, however many ranks share the model. Shares are planned from lengths alone, so every
leader plans the same. What every rank needs of every trajectory to weigh its tokens and to pack the batch (ids, masks,
log-probs and what ``SHARED_EXTRAS`` names: 9 to 13 bytes a token) then goes from each leader to all ranks; the large
columns, such as routed experts, stay with the leader of the share.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.distributed as dist

from slime_async import branches
from slime_async.config import Config
from slime_async.learner.feed import CHECK_INTERVAL_S, LEASE_POLL_S, Feed
from slime_async.packing import pack
from slime_async.protocol import Batch, Fetch, Fetched, FollowLease, Hello, Message, StoredTrajectory
from slime_async.trajectory import Trajectory, TrajectoryKey
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.codec import DEFAULT_LIMITS, decode, encode
from slime_async.transport.security import client_security
from slime_async.transport.threads import in_daemon_thread

SHARED_EXTRAS = (branches.STARTS, branches.ROLES, branches.REWARDS, branches.TOKEN_REWARDS)
"""Optional columns that every rank needs of every trajectory; all are small"""


def plan_shares(stored: Sequence[StoredTrajectory], budget_tokens: int, ranks: int) -> list[tuple[TrajectoryKey, ...]]:
    """Which trajectories each data-parallel rank fetches: balanced by tokens, by the packing's own rule."""
    packing = pack([max(1, one.tokens) for one in stored], budget_tokens, ranks)
    return [tuple(stored[i].key for i in sorted(i for bin in rank for i in bin)) for rank in packing.ranks]


class Share:
    """A leader's: fetches its part of each batch, one batch ahead, on a thread of its own."""

    def __init__(
        self,
        client: BlockingClient,
        incarnation: int,
        number: int,
        plan: Callable[[Sequence[StoredTrajectory]], list[tuple[TrajectoryKey, ...]]],
        patience_s: float,
    ) -> None:
        """``plan`` gives everybody's share, this is the ``number``-th. ``patience_s`` is how long an answer may take
        beyond its own wait: a hub that is started again needs some."""
        self._client = client
        self._incarnation = incarnation
        self._number = number
        self._plan = plan
        self._patience_s = patience_s
        self._ahead: tuple[int, Future[tuple[Trajectory, ...]]] | None = None

    def begin(self, train_version: int) -> None:
        """Fetch what this version trains on as soon as it is leased, unless that is under way."""
        if self._ahead is None or self._ahead[0] != train_version:
            fetching = in_daemon_thread(lambda: self._fetch(train_version), f"fetch-{train_version}")
            self._ahead = train_version, fetching

    def take(self, train_version: int, check: Callable[[], None]) -> tuple[Trajectory, ...]:
        """Of a batch that is leased. Raises ``TimeoutError`` when the hub does not hand it out."""
        self.begin(train_version)
        assert self._ahead is not None
        fetching, deadline = self._ahead[1], time.monotonic() + LEASE_POLL_S + 2 * self._patience_s
        while not wait([fetching], CHECK_INTERVAL_S).done:
            check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the hub did not hand out batch {train_version}, which is leased, in time")
        self._ahead = None
        return fetching.result()

    def _fetch(self, train_version: int) -> tuple[Trajectory, ...]:
        follow = FollowLease(self._incarnation, train_version, LEASE_POLL_S)
        while not isinstance(leased := self._client.call(follow, LEASE_POLL_S + self._patience_s, retry=True), Batch):
            pass  # not leased yet: each answer takes LEASE_POLL_S, and the client's end ends this thread
        mine = self._plan(leased.stored)[self._number]
        if not mine:
            return ()
        fetched = self._client.call(Fetch(train_version, mine), self._patience_s, retry=True)
        assert isinstance(fetched, Fetched), fetched
        return fetched.trajectories


class FetchingFeed:
    """Every rank of several. ``lease`` is rank 0's, and gives batches without payloads; ``share`` is a leader's.

    ``leaders`` are the global ranks of the leaders, in the order of the shares. Raises ``TimeoutError`` when no batch
    came in time, and ``RuntimeError`` when ranks disagree on what there is.
    """

    def __init__(
        self,
        lease: Feed | None,
        share: Share | None,
        leaders: Sequence[int],
        last_version: int,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._lease = lease
        self._share = share
        self._leaders = leaders
        self._last_version = last_version
        self._device = device
        self._check = check

    def next_batch(self, train_version: int) -> Batch | None:
        if self._share is not None:
            self._share.begin(train_version)
        head = self._from(0, None if self._lease is None else self._lease.next_batch(train_version), train_version)
        if head is None:
            return None
        own = () if self._share is None else self._share.take(train_version, self._check)
        if self._share is not None and train_version + 1 < self._last_version:
            self._share.begin(train_version + 1)
        found: dict[TrajectoryKey, Trajectory] = {}
        for leader in self._leaders:
            part = Batch(train_version, tuple(map(shared, own))) if leader == dist.get_rank() else None
            came = self._from(leader, part, train_version)
            assert came is not None, f"rank {leader} handed over nothing"
            found |= {t.key: t for t in came.trajectories}
        found |= {trajectory.key: trajectory for trajectory in own}
        if set(found) != {one.key for one in head.stored}:
            raise RuntimeError(f"batch {train_version}: {len(head.stored)} trajectories are leased, {len(found)} came")
        return dataclasses.replace(head, trajectories=tuple(found[one.key] for one in head.stored), stored=())

    def _from(self, rank: int, batch: Batch | None, train_version: int) -> Batch | None:
        """What ``rank`` hands to all; only there it is given. The process group's timeout bounds the wait."""
        received = broadcast(batch, rank, self._device)
        if received is not None and received.train_version != train_version:
            raise RuntimeError(f"rank {rank} trains version {received.train_version}, this rank {train_version}")
        return received


@contextmanager
def fetching_feed(
    config: Config,
    hub_address: str,
    incarnation: int,
    leaders: Sequence[int],
    device: torch.device,
    patience_s: float,
    lease: Feed | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[FetchingFeed]:
    """The feed of every rank of several, with its connection. ``lease`` and ``check`` are rank 0's."""
    rank = dist.get_rank()
    with ExitStack() as stack:
        share = None
        if rank in leaders:
            hello = Hello("observer", f"learner-{incarnation}-rank-{rank}-{os.getpid()}")
            client = BlockingClient(
                hub_address,
                hello,
                handler=_for_rank_0,
                security=client_security(config.hub),
                reconnect_s=config.hub.reconnect_s,
            )
            stack.enter_context(client)
            plan = partial(plan_shares, budget_tokens=config.learner.microbatch_tokens, ranks=len(leaders))
            share = Share(client, incarnation, leaders.index(rank), plan, patience_s)
        yield FetchingFeed(lease, share, leaders, config.run.steps, device, check)


async def _for_rank_0(_: Message) -> None:
    """What the hub tells everyone is for rank 0 to act on."""


def shared(trajectory: Trajectory) -> Trajectory:
    """Without the columns that only its data-parallel rank needs."""
    extras = {name: trajectory.extras[name] for name in SHARED_EXTRAS if name in trajectory.extras}
    return dataclasses.replace(trajectory, extras=extras)


def broadcast(batch: Batch | None, source: int, device: torch.device) -> Batch | None:
    """``batch`` of rank ``source``, on every rank."""
    sending = dist.get_rank() == source
    frames = [] if batch is None else [memoryview(frame) for frame in encode(batch)]
    count = torch.tensor([len(frames)], dtype=torch.int64, device=device)
    dist.broadcast(count, src=source)
    if not int(count):
        return None
    sizes = torch.zeros(int(count), dtype=torch.int64, device=device)
    if sending:
        sizes = torch.tensor([frame.nbytes for frame in frames], dtype=torch.int64, device=device)
    dist.broadcast(sizes, src=source)
    if sending:
        payload = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8).to(device)
    else:
        payload = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
    dist.broadcast(payload, src=source)
    if sending:
        return batch
    received = decode([frame.numpy().data for frame in torch.split(payload.cpu(), sizes.tolist())], DEFAULT_LIMITS)
    assert isinstance(received.message, Batch), received.message
    return received.message
