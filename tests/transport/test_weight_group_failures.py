"""Weight groups whose members die: real processes, killed; nobody hangs, nothing leaks, the next group works."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from slime_async.transport.weight_group import WeightGroup, WeightGroupError, WeightGroupTimeoutError, host_group
from tests.transport.weight_group_peer import ELEMENTS, TENSORS, open_resources, settled

TIMEOUT_S = 5.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads and sockets in /proc")


class Peer:
    """One engine rank's process."""

    threads: int
    """What it had before any group, as it said when it was ready"""
    files: int

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.transport.weight_group_peer"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def join(self, spec: object, rank: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(dataclasses.asdict(spec) | {"rank": rank}) + "\n")  # type: ignore[call-overload]
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@contextmanager
def formed(epoch: int, peers: list[Peer]) -> Iterator[WeightGroup]:
    """A group of this process and all ``peers``."""
    spec, _store = host_group("weights", epoch, len(peers) + 1, "gloo", TIMEOUT_S)
    for rank, peer in enumerate(peers, 1):
        peer.join(spec, rank)
    group = WeightGroup.create(spec, 0)
    try:
        assert [peer.hear() for peer in peers] == ["joined"] * len(peers)
        yield group
    finally:
        group.close()


def weights(victim: Peer | None = None) -> Iterator[tuple[str, Tensor]]:
    """What is sent; half way through, the ``victim`` is killed."""
    for i in range(TENSORS):
        if i == TENSORS // 2 and victim is not None:
            victim.kill()
        yield f"w{i}", torch.full((ELEMENTS,), float(i), dtype=torch.bfloat16)


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    started = [Peer() for _ in range(3)]
    for peer in started:
        peer.threads, peer.files = peer.hear()
    yield started.copy()
    for peer in started:
        peer.close()


def assert_everyone_receives(group: WeightGroup, peers: list[Peer]) -> None:
    group.send(weights())
    for peer in peers:
        assert peer.hear() == [float(i) for i in range(TENSORS)]


def assert_nothing_leaked(peers: list[Peer]) -> None:
    for peer in peers:
        threads, files = peer.hear()
        assert threads <= peer.threads
        assert files <= peer.files


def test_a_peer_killed_in_a_broadcast_ends_in_an_error_everywhere_and_the_next_group_works(peers: list[Peer]) -> None:
    with formed(1, peers) as group:
        assert_everyone_receives(group, peers)
    assert_nothing_leaked(peers)
    here = open_resources()  # the first store of a process keeps two descriptors for good

    victim = peers.pop(0)  # the root sends to rank 1 itself
    with formed(2, [victim, *peers]) as group:
        begun = time.monotonic()
        with pytest.raises(WeightGroupError, match="weight group 'weights-2', rank 0 of 4: send did not finish"):
            group.send(weights(victim))
        with pytest.raises(WeightGroupError, match=r"is unusable .* form a new one"):
            group.send(weights())
        outcomes = [peer.hear() for peer in peers]
        assert time.monotonic() - begun < 4 * TIMEOUT_S  # a bound against hanging, not a measurement
    for outcome in outcomes:
        assert "weight group 'weights-2'" in outcome
    assert_nothing_leaked(peers)

    with formed(3, peers) as group:
        assert_everyone_receives(group, peers)
    assert_nothing_leaked(peers)
    threads, files = settled(here)
    assert threads <= here[0]
    assert files <= here[1]


def test_whoever_does_not_join_is_counted_in_the_error() -> None:
    spec, _store = host_group("lonely", 7, 3, "gloo", 1.0)
    with pytest.raises(WeightGroupTimeoutError, match=r"'lonely-7', rank 0 of 3: not everybody joined .*1/3 clients"):
        WeightGroup.create(spec, 0)


def test_a_rank_outside_the_group_is_refused() -> None:
    spec, _store = host_group("small", 1, 2, "gloo", 1.0)
    with pytest.raises(ValueError, match="rank 2 does not exist in weight group 'small-1' of 2 ranks"):
        WeightGroup.create(spec, 2)
