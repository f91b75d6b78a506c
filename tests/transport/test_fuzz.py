"""Whatever comes in, ``decode`` gives a message or raises ``BadMessage``, and nothing else."""

from __future__ import annotations

import random

import msgpack
import numpy as np

from slime_async.protocol import (
    Batch,
    Deliver,
    EngineInfo,
    Granted,
    Heartbeat,
    Hello,
    PauseEngine,
    PeerStatus,
    ReceiveWeights,
    Relay,
    Reservation,
    RunStatus,
    TensorSpec,
    WeightManifest,
)
from slime_async.trajectory import TaskRef, WeightId
from slime_async.transport.codec import BadMessage, Limits, decode, encode
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
SMALL = Limits(header_bytes=4096, frame_bytes=4096, frames=16, total_bytes=1 << 16, collection_length=64)


def survives(frames: list[bytes]) -> bool:
    """Whether it decoded; anything but ``BadMessage`` escapes and fails the test."""
    try:
        decode(frames, SMALL)
    except BadMessage as bad:
        problem = str(bad)
    else:
        return True
    assert len(problem) < 2000
    return False


def test_mutated_frames_give_bad_messages_only() -> None:
    rng = random.Random(7)
    wires = [[bytes(frame) for frame in encode(message, call_id=3)] for message in MESSAGES]
    decoded = 0
    for _ in range(20_000):
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
        decoded += survives(frames)
    assert 0 < decoded < 10_000  # both outcomes were met: changes within arrays decode, most others don't


def test_random_bytes_give_bad_messages_only() -> None:
    rng = random.Random(8)
    for _ in range(3_000):
        frames = [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(4))]
        assert not survives(frames)


def random_value(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind == 7:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {str(rng.randrange(3)): random_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    if kind == 9:
        return msgpack.packb(random_value(rng, depth + 1))
    return (None, True, rng.randrange(-9, 2**64), 0.5, "text", b"bytes", msgpack.Timestamp(1, 2))[kind]


def test_well_formed_headers_with_wrong_values_give_bad_messages_only() -> None:
    """Swap one value anywhere in the tree of a good message for a random one."""
    rng = random.Random(9)

    def swapped(node: object) -> object:
        if rng.random() < 0.12:
            return random_value(rng)
        if isinstance(node, list):
            return [swapped(entry) for entry in node]
        if isinstance(node, dict):
            return {key: swapped(entry) for key, entry in node.items()}
        if isinstance(node, bytes) and len(node) > 60:  # a trajectory's own header
            return msgpack.packb(swapped(msgpack.unpackb(node)))
        return node

    wires = [[bytes(frame) for frame in encode(message, call_id=3)] for message in MESSAGES]
    trees = [(msgpack.unpackb(frames[0]), frames[1:]) for frames in wires]
    outcomes = np.zeros(2, int)
    for _ in range(8_000):
        tree, rest = rng.choice(trees)
        outcomes[int(survives([msgpack.packb(swapped(tree)), *rest]))] += 1
    assert outcomes.all()
