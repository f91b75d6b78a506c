"""Weight groups of real processes: what is sent arrives, and whoever dies takes no one's time beyond the deadline."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from slime_async.transport import weight_group
from slime_async.transport.weight_group import WeightGroup, WeightGroupError, WeightGroupTimeoutError, host_group
from slime_async.transport.weight_layout import buffers_of
from tests.transport.group_peer import REPLY_S, Peer, digests, manifest_of

TENSORS = {"a": torch.arange(70_000.0), "b": torch.ones(3, 5)}


def form(peers: list[Peer], epoch: int = 1, timeout_s: float = 10.0) -> WeightGroup:
    """The learner's rank of a group with all ``peers``."""
    spec, store = host_group("weights", epoch, 1 + len(peers), "gloo", timeout_s)
    for rank, peer in enumerate(peers, start=1):
        peer.ask("join", spec, rank)
    group = WeightGroup.create(spec, 0)
    del store
    assert [peer.reply() for peer in peers] == [None] * len(peers)
    return group


def assert_delivers(group: WeightGroup, peers: list[Peer], tensors: dict[str, Tensor]) -> None:
    for peer in peers:
        peer.ask("receive", manifest_of(tensors))
    group.send(tensors.items())
    assert [peer.reply() for peer in peers] == [digests(tensors)] * len(peers)


def test_every_dtype_and_shape_arrives_bitwise_at_every_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(7, 33, generator=generator)
    tensors = {str(dtype): noise.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
    tensors |= {str(dtype): (noise * 50).to(dtype) for dtype in (torch.int8, torch.int32, torch.int64)}
    tensors["uint8"] = torch.arange(256, dtype=torch.uint8)
    tensors["not finite"] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    tensors["scalar"] = torch.tensor(3.5)
    tensors["transposed"] = noise.T
    tensors["large"] = torch.randn(1_000_003, generator=generator)
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2)).detach()
    with Peer.several(2) as peers:
        group = form(peers)
        assert_delivers(group, peers, tensors)
        assert_delivers(group, peers, {name: tensor + 1 for name, tensor in tensors.items()})
        _first, *others = tensors.values()
        assert group.transfer.bytes == sum((tensor + 1).nbytes for tensor in others)
        assert group.transfer.seconds > 0
        group.close()


@pytest.mark.parametrize("buffer_bytes", [1, 1000, 1 << 30])
def test_tensors_arrive_side_by_side_in_buffers(buffer_bytes: int) -> None:
    tensors = {str(n): torch.arange(n, dtype=torch.int16) for n in (1, 127, 128, 129, 1000)} | TENSORS
    manifest = manifest_of(tensors)
    layouts = buffers_of(manifest, buffer_bytes)
    buffers = [(str(i), torch.zeros(layout.nbytes, dtype=torch.uint8)) for i, layout in enumerate(layouts)]
    for layout, (_, buffer) in zip(layouts, buffers, strict=True):
        for name, view in layout.views(buffer):
            view.copy_(tensors[name])
    with Peer.several(1) as peers:
        group = form(peers)
        peers[0].ask("receive", manifest, buffer_bytes)
        group.send(buffers)
        assert peers[0].reply() == digests(tensors)
        group.close()


def test_a_port_that_an_earlier_group_had_serves_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch remembers servers by port for as long as the process lives; ports come again after some thousand groups."""
    listener = weight_group.listen
    with listener() as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(weight_group, "listen", lambda: listener(port))
    with Peer.several(1) as peers:
        for epoch in (1, 2):
            group = form(peers, epoch)
            assert group.spec.master_port == port
            assert_delivers(group, peers, TENSORS)
            group.close()
            del group


def test_a_peer_killed_before_it_joins_fails_the_others_by_name_and_the_next_group_forms_without_it() -> None:
    with Peer.several(2) as (survivor, victim):
        victim.kill()
        spec, store = host_group("weights", 7, 3, "gloo", timeout_s=1.0)
        survivor.ask("join", spec, 1)
        with pytest.raises(WeightGroupTimeoutError, match="'weights-7', rank 0 of 3: not everybody joined"):
            WeightGroup.create(spec, 0)
        del store
        error = survivor.reply()
        assert isinstance(error, WeightGroupError)
        assert "'weights-7', rank 1 of 3" in str(error)

        group = form([survivor], epoch=8)
        assert_delivers(group, [survivor], TENSORS)
        group.close()


@pytest.mark.parametrize("victim_rank", [1, 2, 3])
def test_after_a_death_in_mid_broadcast_survivors_have_all_or_an_error_and_the_next_group_works(
    victim_rank: int,
) -> None:
    """gloo relays along a tree: who notices depends on the place of the dead, but somebody always does."""
    tensors = {str(i): torch.full((300_000,), float(i)) for i in range(4)}

    with Peer.several(3) as peers:
        group = form(peers)
        victim, survivors = peers[victim_rank - 1], peers[: victim_rank - 1] + peers[victim_rank:]

        def kill_after_the_first() -> Iterator[tuple[str, Tensor]]:
            for i, item in enumerate(tensors.items()):
                if i == 1:
                    victim.kill()
                yield item

        for peer in survivors:
            peer.ask("receive", manifest_of(tensors))
        sender_error = None
        try:
            group.send(kill_after_the_first())
        except WeightGroupError as error:
            sender_error = error
        errors = [outcome for peer in survivors if (outcome := peer.reply()) != digests(tensors)]
        errors += [sender_error] if sender_error else []
        assert errors
        for error in errors:
            assert isinstance(error, WeightGroupError)
            assert not isinstance(error, WeightGroupTimeoutError)
            assert "'weights-1'" in str(error)
        group.close()

        group = form(survivors, epoch=2)
        assert_delivers(group, survivors, tensors)
        group.close()


def test_the_only_peers_death_in_mid_broadcast_is_the_senders_error() -> None:
    with Peer.several(1) as (victim,):
        group = form([victim])

        def kill_before_the_first() -> Iterator[tuple[str, Tensor]]:
            victim.kill()
            yield from TENSORS.items()

        with pytest.raises(WeightGroupError, match="'weights-1', rank 0 of 2: send"):
            group.send(kill_before_the_first())
        with pytest.raises(WeightGroupError, match="unusable"):
            group.send(TENSORS.items())


def test_a_silent_peer_costs_the_sender_the_deadline_and_no_more() -> None:
    """The peer is alive but takes no part."""
    with Peer.several(1) as peers:
        group = form(peers, timeout_s=1.0)
        big = {"a": torch.zeros(20_000_000)}  # more than sockets buffer
        with pytest.raises(WeightGroupTimeoutError, match="'weights-1', rank 0 of 2: send"):
            group.send(big.items())
        group = form(peers, epoch=2)
        assert_delivers(group, peers, TENSORS)
        group.close()


# --------------------------------------------------------------------------------- both ranks in this process


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def pair(pool: ThreadPoolExecutor, epoch: int = 1, timeout_s: float = 10.0) -> tuple[WeightGroup, WeightGroup]:
    spec, store = host_group("weights", epoch, 2, "gloo", timeout_s)
    learner, engine = (pool.submit(WeightGroup.create, spec, rank) for rank in (0, 1))
    both = learner.result(REPLY_S), engine.result(REPLY_S)
    del store
    return both


def test_weights_that_cannot_be_read_break_the_group_for_both_sides(pool: ThreadPoolExecutor) -> None:
    def fail_after_the_first() -> Iterator[tuple[str, Tensor]]:
        yield "a", TENSORS["a"]
        raise KeyError("model.layers.3.mlp.up_proj.weight")

    learner, engine = pair(pool)
    receiving: Future[dict[str, Tensor]] = pool.submit(engine.receive, manifest_of(TENSORS))
    with pytest.raises(KeyError, match="up_proj"):
        learner.send(fail_after_the_first())
    error = receiving.exception(REPLY_S)
    assert isinstance(error, WeightGroupError)
    assert not isinstance(error, WeightGroupTimeoutError)
    for use in (lambda: learner.send(TENSORS.items()), lambda: engine.receive(manifest_of(TENSORS))):
        with pytest.raises(WeightGroupError, match="unusable"):
            use()


def test_closing_releases_threads_sockets_and_memory(pool: ThreadPoolExecutor) -> None:
    def cycle(epoch: int) -> None:
        learner, engine = pair(pool, epoch)
        receiving = pool.submit(engine.receive, manifest_of(TENSORS))
        learner.send(TENSORS.items())
        received = receiving.result(REPLY_S)
        assert digests(received) == digests(TENSORS)
        learner.close()
        engine.close()
        learner.close()

    def resources() -> tuple[int, int, int]:
        """Python's threads, all threads, open files"""
        return threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def ours() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "weights-" in thread.name]

    cycle(1)  # pools that stay for the process's life come up
    settle(lambda: not ours())
    before = resources()
    for epoch in range(2, 6):
        cycle(epoch)
    settle(lambda: not ours() and all(after <= b for after, b in zip(resources(), before, strict=True)))


def settle(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        time.sleep(0.01)


def test_a_group_whose_learner_never_joins_is_given_up_by_name() -> None:
    spec, store = host_group("weights", 5, 2, "gloo", timeout_s=0.5)
    with pytest.raises(WeightGroupError, match="'weights-5', rank 1 of 2"):
        WeightGroup.create(spec, 1)
    del store


def test_a_store_that_nobody_hosts_is_an_error_within_the_deadline() -> None:
    spec, store = host_group("weights", 1, 2, "gloo", timeout_s=0.5)
    del store
    with pytest.raises(WeightGroupError, match="'weights-1', rank 1 of 2"):
        WeightGroup.create(spec, 1)


def test_roles_and_ranks_are_checked(pool: ThreadPoolExecutor) -> None:
    learner, engine = pair(pool)
    with pytest.raises(ValueError, match=r"rank 0 .* cannot receive"):
        learner.receive(manifest_of(TENSORS))
    with pytest.raises(ValueError, match=r"rank 1 .* cannot send"):
        engine.send(TENSORS.items())
    with pytest.raises(ValueError, match="rank 2 does not exist"):
        WeightGroup.create(learner.spec, 2)
    learner.close()
    engine.close()
    with pytest.raises(WeightGroupError, match="it was closed"):
        learner.send(TENSORS.items())


@pytest.mark.parametrize(
    ("world_size", "timeout_s", "complaint"), [(1, 1.0, "world_size is 1"), (2, 0, "timeout_s is 0")]
)
def test_a_group_that_could_never_work_is_refused(world_size: int, timeout_s: float, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        host_group("weights", 1, world_size, "gloo", timeout_s)


def test_a_manifest_of_unknown_dtype_leaves_the_group_usable(pool: ThreadPoolExecutor) -> None:
    learner, engine = pair(pool)
    wrong = manifest_of({"a": torch.zeros(1)})
    tensor = wrong.tensors[0]
    with pytest.raises(ValueError, match="'float31' is no torch dtype"):
        engine.receive(type(wrong)((type(tensor)("a", "float31", (1,)),)))
    receiving = pool.submit(engine.receive, manifest_of(TENSORS))
    learner.send(TENSORS.items())
    assert digests(receiving.result(REPLY_S)) == digests(TENSORS)
    learner.close()
    engine.close()
