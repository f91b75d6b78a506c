"""One of two ranks that share their batches: ``feed_job.py RANK STORE`` prints a digest of every batch it trains."""

from __future__ import annotations

import hashlib
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from slime_async.learner.feed import FollowingFeed, SharingFeed
from slime_async.protocol import Batch
from slime_async.transport.codec import DEFAULT_LIMITS, encode
from tests.transport.examples import make_trajectory

BATCHES = 3


class Prepared:
    def next_batch(self, train_version: int) -> Batch | None:
        """Batches of different sizes, with columns of odd and of no length; then the time is up."""
        if train_version == BATCHES:
            return None
        extras = {"experts": np.full((5, 3), train_version, np.uint8), "none": np.zeros((0, 4), np.float32)}
        return Batch(train_version, tuple(make_trajectory(i, extras=extras) for i in range(train_version + 1)))


def main(rank: int, store: str) -> None:
    deadline = timedelta(seconds=30)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=deadline)
    device = torch.device("cpu")
    feed = SharingFeed(Prepared(), device) if rank == 0 else FollowingFeed(device, DEFAULT_LIMITS)
    for version in range(BATCHES + 1):
        batch = feed.next_batch(version)
        if batch is None:
            break
        digest = hashlib.sha256(b"".join(bytes(frame) for frame in encode(batch)))
        sys.stdout.write(digest.hexdigest() + "\n")
    dist.destroy_process_group()


main(int(sys.argv[1]), sys.argv[2])
