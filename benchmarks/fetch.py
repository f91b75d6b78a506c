"""A learner of four ranks on loopback: each rank fetches its share, or rank 0 hands the whole batch to the others.

    python -m benchmarks.fetch [--seconds 20] [--megabytes 16] [--out FILE]

A hub's process, four actors' connections that deliver trajectories with routed experts, and four ranks joined by gloo.
A batch's time is that from asking for it until the last rank has what it trains on; nothing is trained, so nothing
hides the transfers. "rank 0" leases with payloads and broadcasts them, as learners of several ranks did before ranks
fetched their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq

from benchmarks.hub import hub_process, make_config
from benchmarks.hub_parts import SPAWN, WAIT_S, beside, sender
from slime_async.learner.feed import Feed, HubFeed
from slime_async.learner.fetch import FetchingFeed, Share, broadcast, plan_shares
from slime_async.protocol import Batch, Commit, Hello, Message, Published
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient

RANKS = 4
BATCH = 16
WARM_UP = 1
STEPS = 1000
"""More than are ever taken"""


async def ignore(_: Message) -> None:
    """Members and the like."""


class ByRank0:
    """Rank 0 hands over everything."""

    def __init__(self, lease: Feed | None) -> None:
        self._lease = lease

    def next_batch(self, train_version: int) -> Batch:
        batch = None if self._lease is None else self._lease.next_batch(train_version)
        return broadcast(batch, 0, torch.device("cpu"))


def rank_main(rank: int, store: str, address: str, fetch: bool, seconds: float, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS, timeout=timedelta(seconds=300)
    )
    learner = lease = share = None
    if rank == 0:
        learner = BlockingClient(address, Hello("learner", "learner", incarnation=1), handler=ignore)
        learner.call(Published(WeightId(1, 0)), WAIT_S)
        lease = HubFeed(learner, 1, STEPS, WAIT_S, WAIT_S, lambda: None, payloads=not fetch)
    feed: Feed = ByRank0(lease)
    if fetch:
        client = BlockingClient(address, Hello("observer", f"rank-{rank}"), handler=ignore)
        plan = partial(plan_shares, budget_tokens=1 << 20, ranks=RANKS)
        share = Share(client, 1, rank, plan, WAIT_S)
        feed = FetchingFeed(lease, share, range(RANKS), STEPS, torch.device("cpu"))
    times, version, begun, cpu_begun_s = [], 0, time.monotonic(), time.process_time()
    going = torch.ones(1)
    while going:
        asked = time.monotonic()
        batch = feed.next_batch(version)
        assert len(batch.trajectories) == BATCH
        dist.barrier()
        times.append(time.monotonic() - asked)
        if learner is not None:
            learner.call(Commit(1, version), WAIT_S)
            learner.call(Published(WeightId(1, version + 1)), WAIT_S)
        version += 1
        going = torch.tensor([float(version < WARM_UP + 3 or time.monotonic() - begun < seconds)])
        dist.broadcast(going, src=0)
    results.put((rank, times, time.process_time() - cpu_begun_s))


def measure(fetch: bool, size_bytes: int, seconds: float, directory: Path) -> dict[str, float]:
    config = make_config(BATCH, journal=False)
    results: multiprocessing.Queue[Any] = SPAWN.Queue()
    with hub_process(config, directory / f"hub-{fetch}") as (address, _), beside(sender, address, 4, size_bytes):
        ranks = [
            SPAWN.Process(
                target=rank_main,
                args=(rank, str(directory / f"store-{fetch}"), address, fetch, seconds, results),
                daemon=True,
            )
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.start()
        said = sorted(results.get(timeout=600) for _ in ranks)
        for rank in ranks:
            rank.kill()
            rank.join()
    times = said[0][1][WARM_UP:]
    batch_s = statistics.median(times)
    return {
        "batch_s": batch_s,
        "batches": len(times),
        "gbps": BATCH * size_bytes / batch_s / 1e9,
        "rank_0_cpu_s_per_batch": said[0][2] / len(said[0][1]),
        "other_cpu_s_per_batch": statistics.mean(cpu_s / len(said[0][1]) for _, _, cpu_s in said[1:]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each of the two ways")
    parser.add_argument("--megabytes", type=int, default=16, help="MiB of a trajectory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fetch.json")
    parsed = parser.parse_args(arguments)
    rows = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        for name, fetch in (("rank 0 hands over", False), ("ranks fetch", True)):
            rows[name] = measure(fetch, parsed.megabytes << 20, parsed.seconds, Path(directory))
            print(f"{name:20}" + "  ".join(f"{key} {value:.3f}" for key, value in rows[name].items()), flush=True)
    before, after = rows.values()
    figures = {
        "batch_s_before": before["batch_s"],
        "batch_s_after": after["batch_s"],
        "speedup": before["batch_s"] / after["batch_s"],
        "gbps_after": after["gbps"],
        "rank_0_cpu_over_others_before": before["rank_0_cpu_s_per_batch"] / before["other_cpu_s_per_batch"],
        "rank_0_cpu_over_others_after": after["rank_0_cpu_s_per_batch"] / after["other_cpu_s_per_batch"],
    }
    for name, value in figures.items():
        print(f"{name:32}{value:>12.3f}")
    parsed.out.write_text(
        json.dumps(
            {
                "command": f"python -m benchmarks.fetch --seconds {parsed.seconds:g} --megabytes {parsed.megabytes}",
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, loopback",
                "load_average": load,
                "versions": {
                    "python": platform.python_version(),
                    "pyzmq": zmq.__version__,
                    "zmq": zmq.zmq_version(),
                    "torch": torch.__version__,
                },
                "ranks": RANKS,
                "trajectories_per_batch": BATCH,
                "figures": figures,
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
