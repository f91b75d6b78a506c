"""Faults of an SGLang server whose actor lives, and of its learner, at known points of a publication.

The learner halts in each broadcast, three buffers in, so that "during" is no matter of luck.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

SERVER_FAULTS = ("killed before", "killed during", "hangs during", "killed after", "refuses", "late")
"""What happens to the server when it is to receive: the last two, an HTTP error in place of the call, and an actor that
makes the call when the learner has given up"""
LATE_S = 20.0
LEARNER_FAULT = "learner killed during"
BUFFERS_FIRST = 3
"""Broadcasts until the learner halts. ``weights.buffer_bytes`` has to be small enough that there are more"""
HALT_S = 1.0
FILE = "faults.jsonl"
"""In the run's directory, a line per fault: {"fault", "time_s"}"""


def point_of(fault: str) -> str:
    """Its name for ``benchmarks.chaos.aimed``."""
    return f"server_{fault.replace(' ', '_')}"


def note(fault: str) -> None:
    """For the benchmark, which reads when it happened. This process's own command line says where the run is."""
    directory = Path(sys.argv[sys.argv.index("--run-directory") + 1])
    with (directory / FILE).open("a") as file:
        file.write(json.dumps({"fault": fault, "time_s": time.time()}) + "\n")


def server_fault(fault: str, times: int) -> None:
    """The ``times``-th time that an engine receives, this one of ``SERVER_FAULTS``."""
    from slime_async.actors.sglang.engine import SGLangEngine

    receive, passages = SGLangEngine.receive_weights, itertools.count(1)

    def hit(engine: SGLangEngine, number: signal.Signals) -> None:
        assert engine._server is not None
        os.killpg(engine._server.pid, number)

    async def aimed(engine: SGLangEngine, *arguments: Any, **named: Any) -> None:
        if next(passages) != times:
            await receive(engine, *arguments, **named)
            return
        note(fault)
        if fault == "killed before":
            hit(engine, signal.SIGKILL)
        elif fault.endswith("during"):
            number = signal.SIGKILL if fault.startswith("killed") else signal.SIGSTOP
            asyncio.get_running_loop().call_later(HALT_S / 2, hit, engine, number)
        elif fault == "late":
            await asyncio.sleep(LATE_S)
        with _other_path() if fault == "refuses" else nullcontext():
            await receive(engine, *arguments, **named)
        if fault == "killed after":
            hit(engine, signal.SIGKILL)

    SGLangEngine.receive_weights = aimed  # type: ignore[method-assign]


@contextmanager
def _other_path() -> Iterator[None]:
    """Inside, updates go to a path that the server answers with an error."""
    from slime_async.actors.sglang.client import SGLangClient

    post = SGLangClient.post

    async def aimed(client: SGLangClient, path: str, body: Any, timeout_s: float) -> Any:
        return await post(client, "/nowhere" if path.startswith("/update_weights") else path, body, timeout_s)

    SGLangClient.post = aimed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SGLangClient.post = post  # type: ignore[method-assign]


def halting_learner(times: int) -> None:
    """Halts in every broadcast, and dies in the ``times``-th; 0: never."""
    from slime_async.transport.weight_group import WeightGroup

    send, passages = WeightGroup.send, itertools.count(1)

    def aimed(group: WeightGroup, tensors: Iterable[Any], *arguments: Any, **named: Any) -> None:
        dies, rest = next(passages) == times, iter(tensors)

        def halting() -> Iterator[Any]:
            yield from itertools.islice(rest, BUFFERS_FIRST)
            time.sleep(HALT_S)
            if dies:
                note(LEARNER_FAULT)
                os.kill(os.getpid(), signal.SIGKILL)
            yield from rest

        send(group, halting(), *arguments, **named)

    WeightGroup.send = aimed  # type: ignore[method-assign, assignment]
