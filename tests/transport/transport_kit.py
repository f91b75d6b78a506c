"""What the transport's tests share: any message, a hub that writes everything down, waiting with a deadline."""

from __future__ import annotations

import asyncio
import dataclasses
import types
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import uvloop
from hypothesis import strategies as st

from slime_async.protocol import Commit, Deliver, Delivered, Hello, Lease, Message, NotReady, Ok, Welcome
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId
from slime_async.transport.client import HubClient
from slime_async.transport.coders import DTYPES
from slime_async.transport.server import Peer, Server

T = TypeVar("T")
LIMIT_S = 30.0


def run(work: Coroutine[Any, Any, T]) -> T:
    """One test on an event loop of its own, with a deadline."""
    return uvloop.run(asyncio.wait_for(work, LIMIT_S))


async def eventually(condition: Callable[[], object], limit_s: float = 15.0) -> None:
    """Returns once ``condition`` holds."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.002)


# ------------------------------------------------------------------------------------------- any message

_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    bool: st.booleans(),
    bytes: st.binary(max_size=8),
}


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    n = draw(st.integers(0, 40))
    starts = sorted(draw(st.sets(st.integers(0, n - 1), max_size=3))) if n else []
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mask = rng.integers(0, 2, n, np.uint8)
    mask[: starts[0] if starts else n] = 0
    shapes = st.sampled_from([(0,), (3,), (2, 4), (3, 0, 2), (1, 2, 3, 4)])
    extras = {
        name: rng.integers(0, 2, draw(shapes)).astype(DTYPES[name])
        for name in draw(st.lists(st.sampled_from(sorted(DTYPES)), max_size=2))
    }
    return Trajectory(
        task=draw(anything(TaskRef)),
        sample=draw(_SCALARS[int]),
        attempt=draw(_SCALARS[int]),
        token_ids=rng.integers(-9, 2**31, n, np.int32),
        loss_mask=mask,
        behavior_logprobs=rng.standard_normal(n, np.float32),
        spans=tuple(VersionSpan(start, WeightId(draw(_SCALARS[int]), start)) for start in starts),
        reward=draw(_SCALARS[float]),
        finish_reason=draw(_SCALARS[str]),
        metrics=draw(st.dictionaries(st.text(max_size=4), _SCALARS[float], max_size=2)),
        extras=extras,
    )


def anything(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type annotation of the protocol."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if hint is Trajectory:
        return trajectories()
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([anything(a) for a in arguments])
    if origin is tuple:
        return st.lists(anything(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(anything(arguments[0]), anything(arguments[1]), max_size=3)
    hints = get_type_hints(hint)
    if dataclasses.is_dataclass(hint):
        return st.builds(hint, **{f.name: anything(hints[f.name]) for f in dataclasses.fields(hint)})
    return st.builds(hint, **{name: anything(hints[name]) for name in hint._fields})


def same(a: Any, b: Any) -> bool:
    """Equality that looks into trajectories and arrays, of dtype and bits."""
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a):
        alike = isinstance(b, Trajectory) if isinstance(a, Trajectory) else type(a) is type(b)
        return alike and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def trajectory(tokens: int = 16, extra_bytes: int = 0) -> Trajectory:
    mask = np.ones(tokens, np.uint8)
    mask[: tokens // 4] = 0
    return Trajectory(
        task=TaskRef(serial=3, source="sums", index=5),
        sample=1,
        attempt=0,
        token_ids=np.arange(tokens, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.linspace(-2, 0, tokens, dtype=np.float32),
        spans=(VersionSpan(tokens // 4, WeightId(1, 7)), VersionSpan(tokens // 2, WeightId(1, 8))),
        reward=1.0,
        finish_reason="stop",
        metrics={"turns": 2.0},
        extras={"routed_experts": np.arange(extra_bytes, dtype=np.uint8)} if extra_bytes else {},
    )


# ------------------------------------------------------------------------------------------- a hub

INTERVAL_S = 0.05
TIMEOUT_S = 1.0


class Hub:
    """A server that accepts everything and writes it down."""

    def __init__(self, address: str = "tcp://127.0.0.1:0", **options: Any) -> None:
        self.joined: list[Hello] = []
        self.left: list[tuple[str, str]] = []
        self.calls: list[Message] = []
        self.notes: list[Message] = []
        self.gate = asyncio.Event()
        self.cancelled = 0
        options = {"heartbeat_interval_s": INTERVAL_S, "heartbeat_timeout_s": TIMEOUT_S} | options
        self.server = Server(
            address,
            on_call=self.on_call,
            on_note=self.on_note,
            on_join=self.on_join,
            on_leave=lambda peer, reason: self.left.append((peer.name, reason)),
            **options,
        )

    async def on_join(self, peer: Peer, hello: Hello) -> Welcome:
        if hello.name == "unwanted":
            raise ValueError("unwanted is not wanted here")
        self.joined.append(hello)
        return Welcome(run_id="run", heartbeat_interval_s=99.0, version=4)

    async def on_call(self, peer: Peer, message: Message) -> Message:
        self.calls.append(message)
        if isinstance(message, Deliver):
            return Delivered("accepted")
        if isinstance(message, Lease):  # held until the test opens the gate
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return NotReady("the gate was opened")
        if isinstance(message, Commit):
            if message.train_version < 0:
                raise ValueError(f"cannot commit {message.train_version}")
            return {}["a bug"]  # type: ignore[no-any-return]
        return Ok()

    async def on_note(self, peer: Peer, message: Message) -> None:
        self.notes.append(message)


@asynccontextmanager
async def a_hub(address: str = "tcp://127.0.0.1:0", **options: Any) -> AsyncIterator[Hub]:
    hub = Hub(address, **options)
    await hub.server.start()
    try:
        yield hub
    finally:
        await hub.server.close()


class Inbox:
    """A client's handler that writes down what the hub sends."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> Message | None:
        self.messages.append(message)
        return Ok()


@asynccontextmanager
async def a_client(address: str, name: str = "a", **options: Any) -> AsyncIterator[tuple[HubClient, Inbox]]:
    inbox = Inbox()
    options = {"handler": inbox, "timeout_s": 10.0} | options
    client = await HubClient.connect(address, Hello("actor", name, slots=4), **options)
    try:
        yield client, inbox
    finally:
        await client.close()
