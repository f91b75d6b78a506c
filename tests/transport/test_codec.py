from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slime_async.transport
from slime_async.protocol import (
    PROTOCOL_VERSION,
    Batch,
    Deliver,
    Delivered,
    ErrorReply,
    Evaluate,
    GetStatus,
    Granted,
    Heartbeat,
    Hello,
    Message,
    Ok,
    PauseEngine,
    Relay,
    Reservation,
)
from slime_async.trajectory import NOT_SAMPLED, TaskRef, Trajectory, TrajectoryKey, VersionSpan, WeightId
from slime_async.transport.buffers import BORROW_FROM_BYTES
from slime_async.transport.codec import (
    MESSAGE_KINDS,
    BadMessage,
    Buffer,
    EncodedTrajectory,
    Envelope,
    Limits,
    ReceivedTrajectory,
    decode,
    decode_trajectory,
    encode,
    encode_trajectory,
)
from tests.transport.examples import make_trajectory, same, trajectories, values


def over_the_wire(message: Message, **options: Any) -> Message:
    """As a socket does it: every frame in other memory."""
    return decode([memoryview(bytes(frame)) for frame in encode(message, **options)]).message


def deliver(trajectory: Trajectory) -> ReceivedTrajectory:
    message = over_the_wire(Deliver(trajectory))
    assert isinstance(message, Deliver)
    assert isinstance(message.trajectory, ReceivedTrajectory)
    return message.trajectory


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", MESSAGE_KINDS, ids=lambda kind: kind.__name__)
def test_every_message_comes_back_as_it_was_sent(kind: type[Message]) -> None:
    @settings(max_examples=15)
    @given(values(kind), st.integers(0, 2**63 - 1), st.booleans())
    def check(message: Message, call_id: int, reply: bool) -> None:
        envelope = decode([bytes(f) for f in encode(message, call_id=call_id, reply=reply)])
        assert same(message, envelope.message)
        assert (envelope.call_id, envelope.reply) == (call_id, reply)

    check()


def test_received_arrays_are_read_only() -> None:
    received = deliver(make_trajectory(extras={"experts": np.zeros((2, 3), np.uint8)}))
    for array in (received.token_ids, received.loss_mask, received.behavior_logprobs, received.extras["experts"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_large_arrays_are_views_of_the_frames_on_both_sides() -> None:
    sent = make_trajectory(extras={"experts": np.zeros(BORROW_FROM_BYTES, np.uint8)})
    frames = encode(Deliver(sent))
    assert len(frames) == 3
    assert np.shares_memory(np.frombuffer(frames[2], np.uint8), sent.extras["experts"])
    received = decode(frames).message
    assert isinstance(received, Deliver)
    assert np.shares_memory(received.trajectory.extras["experts"], sent.extras["experts"])
    assert np.shares_memory(received.trajectory.token_ids, np.frombuffer(frames[1], np.uint8))


def test_arrays_at_odd_addresses_come_back_aligned() -> None:
    frames: list[Buffer] = [memoryview(b"." + bytes(frame))[1:] for frame in encode(Deliver(make_trajectory()))]
    message = decode(frames).message
    assert isinstance(message, Deliver)
    assert message.trajectory.token_ids.flags.aligned
    assert same(message.trajectory, make_trajectory())


def test_numpy_scalars_are_sent_as_plain_numbers() -> None:
    message = over_the_wire(Heartbeat({"tokens": np.int64(3), "loss": np.float64(0.5)}))
    assert message == Heartbeat({"tokens": 3, "loss": 0.5})


def test_an_int_where_a_float_belongs_arrives_as_float() -> None:
    message = over_the_wire(Evaluate("a", "b", 1, wait_s=3))
    assert isinstance(message, Evaluate)
    assert type(message.wait_s) is float


def test_a_stored_trajectory_is_sent_on_byte_for_byte() -> None:
    extras = {"small": np.full((5, 2), 3, np.int16), "experts": np.ones(BORROW_FROM_BYTES, np.uint8)}
    stored = [deliver(make_trajectory(i, extras=extras)) for i in range(3)]
    frames = encode(Batch(4, tuple(stored)))
    assert [len(bytes(frame)) for frame in frames[1:]] == [76, BORROW_FROM_BYTES] * 3
    for i, trajectory in enumerate(stored):
        assert trajectory.encoded.frames[-1] is frames[2 * i + 2]
        assert trajectory.encoded.header in bytes(frames[0])
    batch = decode(frames).message
    assert isinstance(batch, Batch)
    assert all(same(a, b) for a, b in zip(stored, batch.trajectories, strict=True))


def test_an_encoded_trajectory_decodes_by_itself_and_knows_its_size() -> None:
    encoded = encode_trajectory(make_trajectory())
    assert encoded.nbytes == len(encoded.header) + 5 * (4 + 1 + 4)
    assert same(decode_trajectory(encoded), make_trajectory())
    assert encode_trajectory(encoded) is encoded
    with pytest.raises(BadMessage, match="raw frames"):
        decode_trajectory(EncodedTrajectory(encoded.header, (*encoded.frames, b"more")))


def test_absent_extras_cost_one_empty_map() -> None:
    plain = encode_trajectory(make_trajectory())
    assert len(plain.frames) == 3
    assert msgpack.unpackb(plain.header)["extras"] == {}
    assert len(encode_trajectory(make_trajectory(extras={"x": np.zeros(1, np.uint8)})).header) > len(plain.header)
    assert len(plain.header) < 300


# --------------------------------------------------------------------------------------------------- what is refused


def test_other_protocol_versions_are_refused_by_name() -> None:
    header = msgpack.packb([PROTOCOL_VERSION + 1, 7, False, ["Whatever", {}, "new"]])
    with pytest.raises(BadMessage, match=f"version {PROTOCOL_VERSION + 1}, this side {PROTOCOL_VERSION}") as caught:
        decode([header])
    assert caught.value.call_id == 7


def test_an_error_reply_is_read_whatever_version_sent_it() -> None:
    body = ["ErrorReply", {"code": "BadMessage", "message": "install the same release"}]
    envelope = decode([msgpack.packb([PROTOCOL_VERSION + 1, 7, True, body])])
    assert envelope == (ErrorReply("BadMessage", "install the same release"), 7, True, ())


GRANTED = Granted(tuple(Reservation(TaskRef(i, "train", i), 0, 0) for i in range(40)))
SMALL: list[tuple[Message, Limits, str]] = [
    (Ok(), Limits(header_bytes=4), "limit is 4 for a header"),
    (Deliver(make_trajectory()), Limits(frame_bytes=51), "frame 1 has 52 bytes, the limit is 51 for a raw frame"),
    (Deliver(make_trajectory()), Limits(frames=0), "has 1 raw frames, the limit is 0"),
    (Deliver(make_trajectory()), Limits(total_bytes=100), "the limit is 100"),
]
RECEIVED: list[tuple[Message, Limits, str]] = [
    *SMALL,
    (GRANTED, Limits(collection_length=39), "within the limits"),
    (Heartbeat({str(i): i for i in range(40)}), Limits(collection_length=39), "within the limits"),
    (ErrorReply("ValueError", "x" * 100), Limits(string_bytes=99), "within the limits"),
    (Deliver(make_trajectory(extras={"x": np.zeros((1, 1))})), Limits(dimensions=1), "too few or too many dimensions"),
]


@pytest.mark.parametrize(("message", "limits", "problem"), RECEIVED)
def test_the_receiver_refuses_what_is_over_a_limit(message: Message, limits: Limits, problem: str) -> None:
    with pytest.raises(BadMessage, match=problem):
        decode(encode(message), limits)


@pytest.mark.parametrize(("message", "limits", "problem"), SMALL)
def test_the_sender_refuses_sizes_that_the_receiver_would_refuse(
    message: Message, limits: Limits, problem: str
) -> None:
    with pytest.raises(BadMessage, match=f"{type(message).__name__}.*{problem}"):
        encode(message, limits=limits)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (Deliver(make_trajectory(token_ids=np.zeros(5, np.int64))), "trajectory.token_ids: wants dtype int32.*convert"),
        (Deliver(make_trajectory(token_ids=[1, 2, 3, 4, 5])), "token_ids: wants a numpy array"),
        (Deliver(make_trajectory(token_ids=np.zeros((5, 1), np.int32))), "one dimension"),
        (Deliver(make_trajectory(extras={"x": np.array(["a"])})), r"extras\['x'\]: wants dtype among"),
        (Deliver(make_trajectory(extras={"x": np.array([None])})), r"extras\['x'\]: wants dtype among"),
        (Deliver(make_trajectory(extras={"x": np.array(1.0)})), r"extras\['x'\].*dimensions"),
        (Deliver(make_trajectory(extras={"x": np.zeros((1,) * 5)})), r"extras\['x'\].*dimensions"),
        (Heartbeat({"x": object()}), "no form on the wire"),  # type: ignore[dict-item]
        (Hello("actor", "a", slots=2**80), "cannot be sent"),
        (ErrorReply("a", "\ud800"), "cannot be sent"),
    ],
)
def test_the_sender_is_told_where_its_value_is_wrong(message: Message, problem: str) -> None:
    with pytest.raises(BadMessage, match=problem):
        encode(message)


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        ("Nothing", {}, "none of the kinds"),
        ("Hello", {}, "Hello has fields"),
        ("Ok", {"more": 1}, "Ok has fields"),
        ("Delivered", {"outcome": "lost"}, r"Delivered.outcome: wants 'accepted' or"),
        ("Drain", {"wait_s": "1"}, "Drain.wait_s: wants float"),
        (
            "FollowLease",
            {"incarnation": True, "train_version": 0, "wait_s": 1.0},
            "incarnation: wants a 64-bit",
        ),
        ("Started", {"key": [1], "attempt": 0}, "Started.key: wants TrajectoryKey"),
        ("Heartbeat", {"report": {"a": [1]}}, r"Heartbeat.report\['a'\]: wants a bool, int, float or str"),
        ("Granted", {"reservations": [{}]}, r"Granted.reservations\[0\]: Reservation has fields"),
        ("Deliver", {"trajectory": b"", "evaluation": ""}, "Deliver.trajectory"),
    ],
)
def test_the_receiver_says_where_a_message_is_wrong(kind: str, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadMessage, match=problem) as caught:
        decode([msgpack.packb([PROTOCOL_VERSION, 9, True, [kind, fields]])])
    assert (caught.value.call_id, caught.value.reply) == (9, True)


def test_a_trajectory_that_contradicts_itself_is_refused() -> None:
    raw = msgpack.unpackb(encode_trajectory(make_trajectory()).header)
    raw["spans"] = [[4, [1, 0]]]
    encoded = EncodedTrajectory(msgpack.packb(raw), encode_trajectory(make_trajectory()).frames)
    with pytest.raises(BadMessage, match="token 2 was sampled"):
        decode_trajectory(encoded)


@pytest.mark.parametrize(
    "header", [b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\xc7\x01\x05x", b"\x81"]
)
def test_headers_that_are_no_message_are_refused(header: bytes) -> None:
    with pytest.raises(BadMessage):
        decode([header])


def test_a_message_without_frames_is_refused() -> None:
    with pytest.raises(BadMessage, match="at least one frame"):
        decode([])


# ----------------------------------------------------------------------------------------------------- no pickle


def test_nothing_on_the_wire_is_pickled() -> None:
    unsafe = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "send_pyobj", "recv_pyobj"}
    files = sorted(Path(slime_async.transport.__path__[0]).glob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            assert not unsafe.intersection(part for name in names for part in name.split(".")), file


def test_keys_and_spans_come_back_as_named_tuples() -> None:
    received = deliver(make_trajectory())
    assert received.key == TrajectoryKey(0, 0)
    assert type(received.spans[0]) is VersionSpan
    assert type(received.spans[0].weights) is WeightId


def test_a_changed_copy_of_a_received_trajectory_is_coded_anew() -> None:
    changed = dataclasses.replace(deliver(make_trajectory(reward=1.0)), reward=0.5)
    assert deliver(changed).reward == 0.5


def test_a_relayed_message_must_be_an_engine_command() -> None:
    relay = Relay("a", PauseEngine("e", "retract"), 1.0)
    assert over_the_wire(relay) == relay
    with pytest.raises(BadMessage, match=r"Relay.message: wants JoinWeightGroup or"):
        encode(Relay("a", GetStatus(), 1.0))  # type: ignore[arg-type]


def test_only_messages_are_sent() -> None:
    with pytest.raises(BadMessage, match="wants"):
        encode(make_trajectory())  # type: ignore[arg-type]


@pytest.mark.parametrize("also", [[0], ["2"], [True], [2**63], list(range(1, 9)), {}, 7])
def test_further_calls_of_a_reply_are_checked(also: Any) -> None:
    body = ["Delivered", {"outcome": "accepted"}]
    with pytest.raises(BadMessage, match="envelope has 5 entries"):
        decode([msgpack.packb([PROTOCOL_VERSION, 9, True, body, also])])
    with pytest.raises(BadMessage, match="envelope has 5 entries"):
        decode([msgpack.packb([PROTOCOL_VERSION, 9, False, body, [2]])])


def test_a_reply_names_all_the_calls_that_it_answers() -> None:
    frames = encode(Delivered("accepted"), call_id=4, reply=True, also=(5, 6))
    assert decode(frames) == Envelope(Delivered("accepted"), 4, True, (5, 6))


@given(trajectories())
def test_tokens_by_version_count_what_each_token_says(trajectory: Trajectory) -> None:
    versions = trajectory.token_versions()
    counted = {
        int(version): int((versions == version).sum()) for version in np.unique(versions[versions != NOT_SAMPLED])
    }
    assert list(trajectory.tokens_by_version().items()) == list(counted.items())
