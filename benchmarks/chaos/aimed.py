"""One role, as the launcher starts it, that dies by SIGKILL the n-th time that it passes a point.

    python -m benchmarks.chaos.aimed POINT N hub|actor|learner ARGUMENTS…

The points are wrapped around the real code here, so that the real code knows nothing of them.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn

from benchmarks.chaos.servers import BUFFERS_FIRST, SERVER_FAULTS, halting_learner, point_of, server_fault

Install = Callable[[int], None]


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")


def before(owner: Any, method: str, times: int, applies: Callable[..., bool] = lambda *_: True) -> None:
    """Die instead of calling ``owner.method`` for the ``times``-th time (of those where ``applies``)."""
    original, passages = getattr(owner, method), itertools.count(1)

    def aimed(*arguments: Any, **named: Any) -> Any:
        if applies(*arguments) and next(passages) == times:
            die()
        return original(*arguments, **named)

    setattr(owner, method, aimed)


def learner_commit(times: int) -> None:
    """Between an optimizer step and its commit."""
    from slime_async.learner.role import HubOutlet

    before(HubOutlet, "commit", times)


def learner_broadcast(times: int) -> None:
    """In the middle of a weight sync: some buffers are sent."""
    from slime_async.transport.weight_group import WeightGroup

    send, passages = WeightGroup.send, itertools.count(1)

    def aimed(group: WeightGroup, tensors: Iterable[Any], *arguments: Any, **named: Any) -> None:
        def half() -> Iterator[Any]:
            yield from itertools.islice(tensors, BUFFERS_FIRST)
            die()

        send(group, half() if next(passages) == times else tensors, *arguments, **named)

    WeightGroup.send = aimed  # type: ignore[method-assign, assignment]


def learner_checkpoint(times: int) -> None:
    """During a checkpoint: all shards are written, but it has not its name yet."""
    from slime_async.learner.checkpoint.directory import CheckpointDirectory

    before(CheckpointDirectory, "complete", times)


def actor_delivery(times: int) -> None:
    """In the middle of a delivery: the trajectory is on its way, the hub's answer is not here."""
    from slime_async.protocol import Deliver
    from slime_async.transport.client import HubClient

    call, passages = HubClient.call, itertools.count(1)

    async def aimed(client: HubClient, message: Any, timeout_s: float, *, retry: bool = False) -> Any:
        if isinstance(message, Deliver) and next(passages) == times:
            asyncio.get_running_loop().call_soon(die)
        return await call(client, message, timeout_s, retry=retry)

    HubClient.call = aimed  # type: ignore[method-assign, assignment]


def actor_receive(times: int) -> None:
    """During a weight sync: paused, and the others of the group already receive."""
    from slime_async.actors.embedded.engine import EmbeddedEngine
    from slime_async.actors.sglang.engine import SGLangEngine

    before(EmbeddedEngine, "receive_weights", times)
    before(SGLangEngine, "receive_weights", times)


def hub_delivery(times: int) -> None:
    """In the middle of a delivery: its payload is in the journal, the event that accepts it is not."""
    from slime_async.queue.events import Accepted
    from slime_async.transport.journal.trail import Trail

    def accepts(_trail: Any, batch: Any) -> bool:
        return any(isinstance(event, Accepted) for events, _ in list(batch) for event in events)

    append, passages = Trail.append, itertools.count(1)

    def aimed(trail: Trail, batch: Iterable[Any]) -> Any:
        entries = list(batch)
        if accepts(trail, entries) and next(passages) == times:
            die()
        return append(trail, entries)

    Trail.append = aimed  # type: ignore[method-assign, assignment]


def hub_relay(times: int) -> None:
    """During a weight sync: the engines are paused, and wait for the word to receive."""
    from slime_async.protocol import ReceiveWeights
    from slime_async.transport.hub import Hub

    before(Hub, "_relay", times, lambda _hub, message: isinstance(message.message, ReceiveWeights))


POINTS: dict[str, Install] = {
    "learner_commit": learner_commit,
    "learner_broadcast": learner_broadcast,
    "learner_checkpoint": learner_checkpoint,
    "actor_delivery": actor_delivery,
    "actor_receive": actor_receive,
    "hub_delivery": hub_delivery,
    "hub_relay": hub_relay,
    "halting_learner": halting_learner,
    **{point_of(fault): partial(server_fault, fault) for fault in SERVER_FAULTS},
}


if __name__ == "__main__":
    from slime_async.cli.main import main

    POINTS[sys.argv[1]](int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
