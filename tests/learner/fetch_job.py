"""One of four ranks, two for each data-parallel rank: ``fetch_job.py RANK STORE HUB``.

Trains batches 0 … STEPS − 1, then again as the learner's next incarnation, which has no checkpoint. Prints for each
batch a digest of what every rank must have, and the keys whose large column this rank holds.
"""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from slime_async.learner.feed import HubFeed
from slime_async.learner.fetch import FetchingFeed, Share, plan_shares, shared
from slime_async.protocol import Batch, Commit, Hello, Message, Published
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.codec import encode

LEADERS = (0, 2)
WAIT_S = 30.0
STEPS = 3


async def ignore(_: Message) -> None:
    """Members and the like."""


def describe(batch: Batch) -> str:
    common = Batch(batch.train_version, tuple(map(shared, batch.trajectories)), rewards=batch.rewards)
    digest = hashlib.sha256(b"".join(bytes(frame) for frame in encode(common))).hexdigest()
    large = [list(t.key) for t in batch.trajectories if "experts" in t.extras]
    return json.dumps([digest, large, [list(t.key) for t in batch.trajectories]])


def train(rank: int, address: str, incarnation: int) -> None:
    """One life of the learner, from its beginning."""
    learner = lease = share = None
    if rank == 0:
        learner = BlockingClient(address, Hello("learner", f"l{incarnation}", incarnation=incarnation), handler=ignore)
        learner.call(Published(WeightId(incarnation, 0)), WAIT_S)
        lease = HubFeed(learner, incarnation, STEPS, WAIT_S, WAIT_S, lambda: None, payloads=False)
    if rank in LEADERS:
        client = BlockingClient(address, Hello("observer", f"rank-{rank}-{incarnation}"), handler=ignore)
        plan = partial(plan_shares, budget_tokens=64, ranks=len(LEADERS))
        share = Share(client, incarnation, LEADERS.index(rank), plan, WAIT_S)
    feed = FetchingFeed(lease, share, LEADERS, STEPS, torch.device("cpu"))
    for version in range(STEPS):
        sys.stdout.write(describe(feed.next_batch(version)) + "\n")
        dist.barrier()
        if learner is not None:
            learner.call(Commit(incarnation, version), WAIT_S)
            learner.call(Published(WeightId(incarnation, version + 1)), WAIT_S)
    if rank in LEADERS:
        client.close()
    if learner is not None:
        learner.close()
    dist.barrier()


def main(rank: int, store: str, address: str) -> None:
    deadline = timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4, timeout=deadline)
    for incarnation in (1, 2):
        train(rank, address, incarnation)
    dist.destroy_process_group()


main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
