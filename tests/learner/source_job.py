"""One rank of a learner that publishes twice, before and after a training step, and says what all weights were then.

``source_job.py JOB``, a JSON object: hub, checkpoint, out, layout, sources, timeout_s, and ``halt``, a rank that waits
for ever once its part of version 1 is to be sent, and says so on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from layout_job import config_for, meet, train_sequences
from safetensors.torch import save_file

from slime_async.config.schema import WeightsConfig
from slime_async.learner.group_source import GroupSource
from slime_async.learner.publisher import Publisher, PublishError
from slime_async.learner.snapshots import Snapshot
from slime_async.learner.trainer import Trainer
from slime_async.learner.weights_outlet import FollowingOutlet, PublishingOutlet, WeightShare
from slime_async.protocol import Commit, EngineInfo, Hello, Lease, Membership, Message
from slime_async.telemetry.spans import SpanRecorder
from slime_async.trajectory import WeightId
from slime_async.transport.blocking import BlockingClient
from slime_async.transport.weight_group import WeightGroupError

DEADLINE_S = 40.0


def main() -> None:
    job, rank = json.loads(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    weights = {"sources": job["sources"], "timeout_s": job["timeout_s"]}
    config = config_for(job["layout"], weights=weights)
    meet(Path(job["out"]) / "ranks")
    trainer = Trainer.build(config, Path(job["checkpoint"]))
    share = WeightShare.agree(config, trainer, "127.0.0.1")
    if rank == job["halt"]:
        _halt(job["how"])
    if rank == 0:
        _publish(job, config.weights, trainer, share)
    else:
        following = FollowingOutlet(share, DEADLINE_S)
        _versions(trainer, Path(job["out"]), lambda version: following.publish(trainer, WeightId(1, version)))
        sys.stdin.readline()


def _versions(trainer: Trainer, out: Path, publish: Callable[[int], object]) -> None:
    for version in range(2):
        if version:
            trainer.train_supervised([(s.token_ids, s.loss_mask) for s in train_sequences()], 1e-2)
        publish(version)
    tensors = {name: tensor.clone() for name, tensor in trainer.export()}
    if int(os.environ["RANK"]) == 0:
        save_file(tensors, out / "all.safetensors")


def _publish(job: dict[str, Any], settings: WeightsConfig, trainer: Trainer, share: WeightShare) -> None:
    engines: list[tuple[EngineInfo, ...]] = []
    publishers: list[Publisher] = []

    async def handle(message: Message) -> None:
        if isinstance(message, Membership):
            engines.append(message.engines)
            for publisher in publishers:
                publisher.set_engines(message.engines)

    with BlockingClient(job["hub"], Hello("learner", "learner", incarnation=1), handler=handle) as client:
        recorder = SpanRecorder(Path(job["out"]) / "spans.jsonl", "learner")
        publisher = Publisher(client, settings, "gloo", recorder, others=share.others)
        publishers.append(publisher)
        publisher.set_engines(engines[-1] if engines else client.welcome.engines)
        outlet = PublishingOutlet(share, publisher, DEADLINE_S)

        def publish(version: int) -> None:
            if version:
                client.call(Lease(1, version - 1, DEADLINE_S), 2 * DEADLINE_S)
                client.call(Commit(1, version - 1), DEADLINE_S)
            outlet.publish(trainer, WeightId(1, version))
            publisher.wait_published(version, DEADLINE_S)

        try:
            _versions(trainer, Path(job["out"]), publish)
        except PublishError as error:
            print(f"failed: {error}", flush=True)
            return
        print("published", flush=True)
        publisher.close()


def _halt(how: str) -> None:
    send, sent = GroupSource.send, []

    def halting(self: GroupSource, snapshot: Snapshot, unless: Sequence[Future[Any]], *, whole_buffers: bool) -> None:
        sent.append(snapshot.weights)
        if len(sent) == 2:
            if how == "fail":
                self.leave()
                raise WeightGroupError("this source broke on purpose")
            print("halted", flush=True)
            threading.Event().wait()
        send(self, snapshot, unless, whole_buffers=whole_buffers)

    patch.object(GroupSource, "send", halting).start()


if __name__ == "__main__":
    main()
