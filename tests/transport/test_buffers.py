"""How arrays come to lie in frames, and out of them again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slime_async.transport import buffers
from slime_async.transport.buffers import ALIGNMENT, DEFAULT_LIMITS, Buffer, Frames, frames_of, size_of
from slime_async.transport.errors import BadMessage

SIZES = st.lists(st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 200])), max_size=20)


def taken(frames: list[Buffer], sizes: list[int]) -> list[bytes]:
    cursor = Frames([memoryview(bytes(frame)) for frame in frames], DEFAULT_LIMITS)
    arrays = [bytes(cursor.take(size)) for size in sizes]
    cursor.end()
    return arrays


@given(SIZES)
@settings(max_examples=200)
def test_arrays_of_any_sizes_come_out_as_they_went_in(sizes: list[int]) -> None:
    arrays = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "BORROW_FROM_BYTES", 64)
        patch.setattr(buffers, "SHARED_FRAME_BYTES", 128)
        frames = frames_of(arrays)
    assert taken(frames, sizes) == arrays
    assert all(size_of(frame) <= 128 or any(frame is array for array in arrays) for frame in frames)
    assert all(any(frame is array for frame in frames) for array in arrays if len(array) >= 64)


def test_one_frame_per_array_is_read_as_well() -> None:
    assert taken([b"ab", b"c", b"def"], [2, 1, 3]) == [b"ab", b"c", b"def"]
    assert taken([b"ab" + bytes(ALIGNMENT - 2) + b"c"], [2, 1]) == [b"ab", b"c"]


@pytest.mark.parametrize(
    ("frames", "sizes", "problem"),
    [
        ([], [1], "names more arrays than its raw frames hold"),
        ([b""], [1], "wants 1 bytes where its frame has 0"),
        ([b"abc"], [4], "wants 4 bytes where its frame has 3"),
        ([b"abc", b"d"], [2, 1], "wants 1 bytes where its frame has 0"),
        ([b"abcdefgh", b"i"], [9], "wants 9 bytes where its frame has 8"),
        ([b"abc"], [2**70], "bytes where its frame has 3"),
        ([b"abc"], [2], "has 1 bytes and 0 raw frames more than its header names"),
        ([b"abc", b"de", b""], [3], "has 0 bytes and 2 raw frames more"),
        ([b""], [], "has 0 bytes and 1 raw frames more"),
    ],
)
def test_frames_that_hold_other_arrays_than_the_header_names_are_refused(
    frames: list[Buffer], sizes: list[int], problem: str
) -> None:
    with pytest.raises(BadMessage, match=problem):
        taken(frames, sizes)


def test_what_is_taken_cannot_be_written_to() -> None:
    assert Frames([bytearray(b"abc")], DEFAULT_LIMITS).take(3).readonly
