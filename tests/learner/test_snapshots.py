"""Weights in large reused buffers, filled while they are followed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from slime_async.learner.snapshots import Export, FillError, Place, Snapshots
from slime_async.protocol import TensorSpec, WeightManifest
from slime_async.trajectory import WeightId
from slime_async.transport.weight_layout import ALIGNMENT_BYTES, buffers_of

DEADLINE_S = 20.0
MANIFEST = WeightManifest(
    (TensorSpec("a", "bfloat16", (3,)), TensorSpec("b", "float32", (5, 2)), TensorSpec("c", "float32", (1000,)))
)


def export_of(value: float) -> Export:
    def export(place: Place) -> Iterator[tuple[str, Tensor]]:
        for spec in MANIFEST.tensors:
            yield spec.name, place(spec).fill_(value)

    return export


def snapshots(buffer_bytes: int = 1024) -> Snapshots:
    return Snapshots(MANIFEST, torch.device("cpu"), buffer_bytes)


def test_a_snapshot_is_followed_buffer_by_buffer_while_it_is_filled() -> None:
    made = snapshots()
    snapshot = made.begin(WeightId(1, 7))
    with ThreadPoolExecutor(1) as thread:

        def follow() -> dict[str, Tensor]:
            return {name: tensor.clone() for name, tensor in snapshot.arriving(DEADLINE_S)}

        following = thread.submit(follow)
        made.fill(snapshot, export_of(7))
        followed = following.result(DEADLINE_S)
    assert list(followed) == ["a", "b", "c"]
    for spec in MANIFEST.tensors:
        assert torch.equal(followed[spec.name], torch.full(spec.shape, 7, dtype=getattr(torch, spec.dtype)))


def test_whole_buffers_are_laid_out_as_receivers_expect_them() -> None:
    made = snapshots()
    snapshot = made.begin(WeightId(1, 7))
    made.fill(snapshot, export_of(7))
    arriving = list(snapshot.arriving(DEADLINE_S, whole_buffers=True))
    assert [name for name, _ in arriving] == ["b", "c"]
    layouts = buffers_of(MANIFEST, made.buffer_bytes)
    received = dict(
        view for layout, (_, buffer) in zip(layouts, arriving, strict=True) for view in layout.views(buffer.clone())
    )
    assert list(received) == ["a", "b", "c"]
    for spec, tensor in zip(MANIFEST.tensors, snapshot.tensors, strict=True):
        assert torch.equal(received[spec.name], tensor)


def test_nothing_is_handed_out_before_its_buffer_is_complete() -> None:
    made = snapshots()
    snapshot = made.begin(WeightId(1, 7))
    with pytest.raises(FillError, match="only 0 of 3 tensors were converted within"):
        next(snapshot.arriving(0.01))
    with pytest.raises(FillError, match="only 0 of 3"):
        snapshot.wait_queued(0.01)


def test_two_sets_of_buffers_are_used_in_turn() -> None:
    made = snapshots()
    taken = []
    for version in range(4):
        snapshot = made.begin(WeightId(1, version))
        made.fill(snapshot, export_of(version))
        taken.append(snapshot)
        if version:
            assert torch.equal(taken[version - 1].tensors[2], torch.full((1000,), float(version - 1)))
    first, second, third, fourth = ({t.untyped_storage().data_ptr() for t in s.tensors} for s in taken)
    assert (first, second) == (third, fourth)
    assert not first & second
    assert len(first) == 2  # a and b share a buffer, c is larger than one


def test_tensors_in_a_buffer_are_aligned_and_do_not_overlap() -> None:
    snapshot = snapshots(1 << 20).begin(WeightId(1, 0))
    starts = [tensor.data_ptr() for tensor in snapshot.tensors]
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in snapshot.tensors]
    assert all((start - starts[0]) % ALIGNMENT_BYTES == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_a_failed_conversion_reaches_whoever_follows() -> None:
    def export(place: Place) -> Iterator[tuple[str, Tensor]]:
        yield "a", place(MANIFEST.tensors[0])
        raise MemoryError("no room for b")

    made = snapshots()
    snapshot = made.begin(WeightId(1, 7))
    with pytest.raises(MemoryError):
        made.fill(snapshot, export)
    with pytest.raises(FillError, match="converting the weights failed: no room for b"):
        snapshot.wait_filled(DEADLINE_S)
