"""Messages to frames and back."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_kit import anything, same, trajectory

from slime_async.protocol import (
    PROTOCOL_VERSION,
    Batch,
    Deliver,
    ErrorReply,
    GetStatus,
    Heartbeat,
    Lease,
    Membership,
    Message,
    NotReady,
    Ok,
    PauseEngine,
    Relay,
)
from slime_async.trajectory import Trajectory
from slime_async.transport.codec import (
    MESSAGES,
    BadMessage,
    Limits,
    decode,
    decode_trajectory,
    encode,
    encode_trajectory,
)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_went(kind: type[Message]) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(anything(kind), st.integers(0, 2**63 - 1), st.booleans())
    def check(message: Message, call_id: int, reply: bool) -> None:
        frames = [bytes(frame) for frame in encode(message, call_id=call_id, reply=reply)]
        envelope = decode(frames)
        assert same(message, envelope.message)
        assert (envelope.call_id, envelope.reply) == (call_id, reply)

    check()


def test_arrays_are_never_copied_neither_out_nor_in() -> None:
    sent = trajectory(tokens=8192, extra_bytes=1 << 20)
    frames = encode(Deliver(sent))
    assert np.shares_memory(np.frombuffer(frames[1], np.int32), sent.token_ids)
    wire = [bytes(frame) for frame in frames]
    received = decode(wire).message.trajectory
    assert np.shares_memory(received.extras["routed_experts"], np.frombuffer(wire[4], np.uint8))
    assert not received.token_ids.flags.writeable


def test_a_received_trajectory_is_sent_on_without_being_coded_again() -> None:
    wire = [bytes(frame) for frame in encode(Deliver(trajectory(extra_bytes=64)))]
    received = decode(wire).message.trajectory
    batch = encode(Batch(7, (received, received)))
    assert [memoryview(f).obj for f in batch[1:]] == [memoryview(f).obj for f in wire[1:] * 2]
    assert received.encoded.header in batch[0]
    stored = encode_trajectory(received)
    assert stored is received.encoded
    assert same(decode(encode(Batch(7, (stored,)))).message.trajectories[0], received)
    assert same(decode_trajectory(stored), received)


def test_a_changed_copy_of_a_received_trajectory_is_coded_anew() -> None:
    received = decode(encode(Deliver(trajectory()))).message.trajectory
    changed = replace(received, reward=0.5)
    assert decode(encode(Deliver(changed))).message.trajectory.reward == 0.5


def test_arrays_at_odd_addresses_are_aligned() -> None:
    frames = [bytes(frame) for frame in encode(Deliver(trajectory()))]
    shifted = memoryview(b"x" + frames[1])[1:]
    assert np.frombuffer(shifted, np.int32).flags.aligned is False
    assert decode([frames[0], shifted, *frames[2:]]).message.trajectory.token_ids.flags.aligned


def test_numpy_scalars_and_whole_floats_are_sent_as_the_annotation_says() -> None:
    message = Heartbeat({"reward": np.float32(0.5), "step": np.int64(3), "done": np.bool_(True)})
    assert decode(encode(message)).message == Heartbeat({"reward": 0.5, "step": 3, "done": True})
    assert type(decode(encode(Lease(1, 2, 3))).message.wait_s) is float


def test_strided_arrays_are_sent_whole() -> None:
    sent = trajectory()
    sent.extras["window"] = np.arange(24, dtype=np.int16).reshape(4, 6)[:, ::2]
    assert same(decode(encode(Deliver(sent))).message.trajectory.extras["window"], sent.extras["window"].copy())


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("token_ids", np.zeros(16, np.int64), "Deliver.trajectory.token_ids: wants dtype int32, got <i8"),
        ("token_ids", np.zeros((16, 1), np.int32), "wants one dimension"),
        ("token_ids", [0] * 16, "wants a numpy array, got list"),
        ("extras", {"x": np.array(["text"])}, "extras"),
        ("extras", {"x": np.zeros(2, ">i4")}, "extras"),
        ("finish_reason", "\ud800", "cannot be sent"),
        ("sample", 2**70, "cannot be sent"),
        ("sample", object(), "cannot be sent"),
    ],
)
def test_the_sender_is_told_what_cannot_be_sent(column: str, value: object, problem: str) -> None:
    bad = trajectory()
    object.__setattr__(bad, column, value)
    with pytest.raises(BadMessage, match=problem):
        encode(Deliver(bad))


@pytest.mark.parametrize(
    ("limits", "message", "problem"),
    [
        (Limits(frame_bytes=100), Deliver(trajectory(64)), "frame 1 has 256 bytes, the limit is 100 for an array"),
        (Limits(header_bytes=100), NotReady("x" * 200), "the limit is 100 for a header"),
        (Limits(frames=2), Deliver(trajectory()), "has 3 raw frames, the limit is 2"),
        (Limits(total_bytes=300), Deliver(trajectory()), "the limit is 300"),
    ],
)
def test_both_sides_refuse_what_is_beyond_the_limits(limits: Limits, message: Message, problem: str) -> None:
    with pytest.raises(BadMessage, match=problem):
        encode(message, limits=limits)
    with pytest.raises(BadMessage, match=problem):
        decode(encode(message), limits)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(collection_length=3), Heartbeat({str(i): i for i in range(4)})),
        (Limits(collection_length=4), Batch(1, (trajectory(),) * 5)),
        (Limits(string_bytes=20), NotReady("x" * 21)),
        (Limits(dimensions=0), Deliver(trajectory(extra_bytes=1))),
    ],
)
def test_the_receiver_refuses_collections_beyond_the_limits(limits: Limits, message: Message) -> None:
    with pytest.raises(BadMessage):
        decode(encode(message), limits)


def header(body: object, *, version: int = PROTOCOL_VERSION, call_id: object = 1, reply: object = False) -> bytes:
    return msgpack.packb([version, call_id, reply, body])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([], "none"),
        ([b""], "no msgpack"),
        ([b"\xc1"], "no msgpack"),
        ([b"\xdd\xff\xff\xff\xff"], "no msgpack"),
        ([b"\x91" * 5000], "no msgpack"),
        ([msgpack.packb([1])], "call id"),
        ([header(["Ok", {}], call_id=-1)], "call id"),
        ([header(["Ok", {}], reply=0)], "call id"),
        ([header("Ok")], "wants .kind, fields."),
        ([header(["Trajectory", {}])], "none of the kinds"),
        ([header(["Ok", []])], "Ok: wants a map"),
        ([header(["Ok", {"x": 1}])], "Ok has fields"),
        ([header(["NotReady", {"raison": "x"}])], "NotReady.reason: missing"),
        ([header(["NotReady", {"reason": b"x"}])], "NotReady.reason: wants str, got bytes"),
        ([header(["Commit", {"incarnation": True, "train_version": 1}])], "Commit.incarnation: wants a 64-bit int"),
        ([header(["Commit", {"incarnation": 2**63, "train_version": 1}])], "wants a 64-bit int"),
        ([header(["Delivered", {"outcome": "eaten"}])], "'accepted' or 'duplicate' or 'unwanted'"),
        ([header(["Heartbeat", {"report": {"x": None}}])], r"report\['x'\]: wants a bool, int, float or str"),
        ([header(["Ok", {}]), b"more"], "1 raw frames, its header names 0"),
        ([header(["Ok", {}]) + b"\x00"], "no msgpack"),
    ],
)
def test_a_bad_message_is_refused_with_where_and_why(frames: list[bytes], problem: str) -> None:
    with pytest.raises(BadMessage, match=problem):
        decode(frames)


@pytest.mark.parametrize(
    ("descriptor", "frame", "problem"),
    [
        (["int32", [2]], b"1234567", "takes 8 bytes, its frame has 7"),
        (["int32", [2**62, 2**62]], b"", "token_ids"),
        (["int64", [1]], b"12345678", "wants dtype int32"),
        (["int32", [-1]], b"", "lengths ≥ 0"),
        (["int32", []], b"1234", "dimensions"),
        (["object", [1]], b"12345678", "wants dtype"),
        ([["int32"], [1]], b"1234", "dtype, shape"),
    ],
)
def test_an_array_must_be_what_its_frame_holds(descriptor: object, frame: bytes, problem: str) -> None:
    encoded = encode_trajectory(trajectory())
    fields = msgpack.unpackb(encoded.header)
    fields["token_ids"] = descriptor
    raw = header(["Deliver", {"trajectory": msgpack.packb(fields), "evaluation": ""}])
    with pytest.raises(BadMessage, match=problem) as caught:
        decode([raw, frame, *encoded.frames[1:]])
    assert caught.value.call_id == 1


def test_a_trajectory_that_contradicts_itself_is_refused() -> None:
    encoded = encode_trajectory(trajectory())
    fields = msgpack.unpackb(encoded.header)
    fields["spans"] = [[9, [0, 0]], [3, [0, 1]]]
    raw = header(["Deliver", {"trajectory": msgpack.packb(fields), "evaluation": ""}])
    with pytest.raises(BadMessage, match="must ascend"):
        decode([raw, *encoded.frames])


def test_peers_of_different_versions_name_both() -> None:
    with pytest.raises(BadMessage, match=f"protocol version 99, this side {PROTOCOL_VERSION}") as caught:
        decode([header(["Hello", {"new": "fields"}], version=99, call_id=5)])
    assert caught.value.call_id == 5
    refusal = ErrorReply("BadMessage", "peer speaks version 1")
    raw = header(["ErrorReply", {"code": refusal.code, "message": refusal.message}], version=99)
    assert decode([raw]).message == refusal


def test_a_relayed_message_must_be_an_engine_command() -> None:
    relay = Relay("a", PauseEngine("e", "retract"), 1.0)
    assert decode(encode(relay)).message == relay
    with pytest.raises(BadMessage, match=r"Relay.message: wants JoinWeightGroup or"):
        encode(Relay("a", GetStatus(), 1.0))  # type: ignore[arg-type]


def test_messages_are_checked_against_their_own_class() -> None:
    with pytest.raises(BadMessage, match="wants"):
        encode(trajectory())  # type: ignore[arg-type]
    with pytest.raises(BadMessage, match=r"Membership\.engines"):
        encode(Membership((Ok(),)))  # type: ignore[arg-type]


def test_a_received_trajectory_is_a_trajectory() -> None:
    assert isinstance(decode(encode(Deliver(trajectory()))).message.trajectory, Trajectory)
