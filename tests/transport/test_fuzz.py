"""Whatever comes in, ``decode`` gives a message or raises ``BadMessage``, and nothing else."""

from __future__ import annotations

import random
from itertools import islice

import msgpack
import numpy as np
import pytest

from slime_async.transport.codec import BadMessage, Limits, decode, encode
from tests.transport.fuzz import MESSAGES, fuzz, mutations

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
    decoded = sum(survives(frames) for frames in islice(mutations(seed=7), 20_000))
    assert 0 < decoded < 10_000  # both outcomes were met: changes within arrays decode, most others don't


def test_a_hub_answers_every_bad_message_and_cuts_off_who_keeps_sending_them() -> None:
    outcome = fuzz(4_000, seed=1)
    assert outcome.refused == 8 * outcome.cut_off > 2_000
    assert outcome.growth_bytes < 32 << 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_mutated_frames_neither_stop_a_hub_nor_fill_its_memory() -> None:
    outcome = fuzz(1_000_000, seed=2)
    assert outcome.refused > 500_000
    assert outcome.growth_bytes < 32 << 20


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
