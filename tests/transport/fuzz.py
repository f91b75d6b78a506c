"""Mutated frames against a hub's process and the decoder.

    python -m tests.transport.fuzz [--frames 1000000] [--seed 1]

Every frame is decoded here first, where only ``BadMessage`` may come out. What the decoder refuses is sent to a real
hub: each such message must be answered with an error, every eighth must get its connection cut off, a well-behaved
client beside must be answered all the time, and the hub's memory must not grow.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from benchmarks.hub import hub_process, make_config, resident_bytes
from slime_async.protocol import (
    Batch,
    Deliver,
    EngineInfo,
    ErrorReply,
    GetStatus,
    Granted,
    Heartbeat,
    Hello,
    Message,
    PauseEngine,
    PeerStatus,
    ReceiveWeights,
    Relay,
    Reservation,
    RunStatus,
    TensorSpec,
    WeightManifest,
    Welcome,
)
from slime_async.trajectory import TaskRef, WeightId
from slime_async.transport.codec import BadMessage, decode, encode
from slime_async.transport.server import MAX_STRIKES
from tests.transport.transport_kit import trajectory

MESSAGES = (
    Hello("actor", "a", 4, (EngineInfo("e", "a", 2),), {"sums": 9}),
    Heartbeat({"x": 1, "y": 2.5, "z": "w", "b": True}),
    Granted((Reservation(TaskRef(1, "sums", 2), 0, 0),)),
    Deliver(trajectory(extra_bytes=9)),
    Batch(3, (trajectory(), trajectory(8))),
    Relay("a", PauseEngine("e", "abort"), 2.0),
    Relay("a", ReceiveWeights("e", WeightManifest((TensorSpec("w", "bfloat16", (2, 3)),)), WeightId(1, 2)), 2.0),
    RunStatus("r", {"x": 1}, (PeerStatus("actor", "a", 0.5, {}),)),
)
WAIT_MS = 60_000


def mutations(seed: int) -> Iterator[list[bytes]]:
    """Messages with one to three changes each, for ever."""
    rng = random.Random(seed)
    wires = [[bytes(frame) for frame in encode(message, call_id=3)] for message in MESSAGES]
    while True:
        frames = list(rng.choice(wires))
        for _ in range(rng.randint(1, 3)):
            i = 0 if rng.random() < 0.7 else rng.randrange(len(frames))
            frame = bytearray(frames[i])
            where = rng.randrange(len(frame) + 1)
            change = rng.randrange(5)
            if change == 0 and where < len(frame):
                frame[where] = rng.randrange(256)
            elif change == 1:
                frame[where:where] = rng.randbytes(rng.randint(1, 4))
            elif change == 2:
                del frame[where : where + rng.randint(1, 8)]
            elif change == 3 and where < len(frame):
                frame[where] ^= 1 << rng.randrange(8)
            elif change == 4:
                frames.append(rng.randbytes(rng.randrange(9)))
            frames[i] = bytes(frame)
        yield frames


@dataclass(slots=True)
class Outcome:
    frames: int = 0
    """Mutated messages, all of them through the decoder"""
    refused: int = 0
    """Of these, what the decoder refused and the hub answered with an error"""
    cut_off: int = 0
    """Connections"""
    growth_bytes: int = 0
    """Of the hub's resident memory, after the first tenth"""


class Client:
    """One bare socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, name: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        assert isinstance(self.call(Hello("observer", name)), Welcome)

    def call(self, message: Message) -> Message:
        self.send(encode(message, call_id=1))
        return self.receive()

    def send(self, frames: Sequence[bytes | bytearray | memoryview]) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> Message:
        """The next message that is no heartbeat."""
        while True:
            assert self._socket.poll(WAIT_MS), "the hub does not answer"
            message = decode(self._socket.recv_multipart()).message
            if not isinstance(message, Heartbeat):
                return message

    def close(self) -> None:
        self._socket.close()


def is_refused(frames: Sequence[bytes]) -> bool:
    """By the decoder; anything but ``BadMessage`` escapes."""
    try:
        decode(frames)
    except BadMessage as bad:
        problem = str(bad)
    else:
        return False
    assert len(problem) < 2000
    return True


def fuzz(count: int, seed: int) -> Outcome:
    """Raises when the hub does anything else than it should."""
    outcome, early = Outcome(), 0
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with (
        tempfile.TemporaryDirectory() as directory,
        hub_process(make_config(32, journal=False), Path(directory) / "run") as (address, pid),
    ):
        source = mutations(seed)
        while outcome.frames < count:
            bad: list[list[bytes]] = []
            while len(bad) < MAX_STRIKES:
                frames = next(source)
                outcome.frames += 1
                if is_refused(frames):
                    bad.append(frames)
            client = Client(context, address, f"fuzz-{outcome.cut_off}")
            for frames in bad:
                client.send(frames)
            replies = [client.receive() for _ in range(MAX_STRIKES + 1)]
            assert all(isinstance(reply, ErrorReply) for reply in replies), replies
            codes = [reply.code for reply in replies if isinstance(reply, ErrorReply)]
            assert codes == ["BadMessage"] * MAX_STRIKES + ["NotConnected"]
            client.close()
            outcome.refused += MAX_STRIKES
            outcome.cut_off += 1
            if outcome.cut_off % 128 == 1:
                good = Client(context, address, f"good-{outcome.cut_off}")
                assert isinstance(good.call(GetStatus()), RunStatus)
                good.close()
            if not early and outcome.frames >= count / 10:
                early = resident_bytes(pid)
        outcome.growth_bytes = resident_bytes(pid) - early
    context.term()
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parsed = parser.parse_args()
    begun = time.monotonic()
    print(fuzz(parsed.frames, parsed.seed), f"{time.monotonic() - begun:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
