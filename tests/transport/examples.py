"""Messages to send: strategies for every class of the protocol, and plain trajectories."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from hypothesis import strategies as st

from slime_async.trajectory import TaskRef, Trajectory, VersionSpan, WeightId
from slime_async.transport.coders import DTYPES

INTS = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.text(max_size=8)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: INTS,
    float: st.floats(allow_nan=False),
    str: TEXTS,
    bool: st.booleans(),
    bytes: st.binary(max_size=80),
}


def make_trajectory(
    serial: int = 0, sample: int = 0, *, version: int = 0, attempt: int = 0, **fields: Any
) -> Trajectory:
    """Two prompt tokens and three sampled ones."""
    values: dict[str, Any] = {
        "task": TaskRef(serial, "train", serial),
        "sample": sample,
        "attempt": 0,
        "token_ids": np.array([1, 2, 3, 4, 5], np.int32),
        "loss_mask": np.array([0, 0, 1, 1, 1], np.uint8),
        "behavior_logprobs": np.array([0, 0, -0.5, -1, -1.5], np.float32),
        "spans": (VersionSpan(2, WeightId(1, version)),),
        "reward": 1.0,
        "finish_reason": "stop",
    }
    return Trajectory(**(values | fields))


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    length = draw(st.integers(1, 40))
    starts = sorted(draw(st.sets(st.integers(0, length - 1), max_size=4)))
    mask = np.zeros(length, np.uint8)
    if starts:
        mask[starts[0] :] = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))[starts[0] :]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return make_trajectory(
        draw(st.integers(-5, 2**40)),
        draw(st.integers(0, 99)),
        token_ids=random.integers(0, 2**31, length).astype(np.int32),
        loss_mask=mask,
        behavior_logprobs=random.standard_normal(length).astype(np.float32),
        spans=tuple(VersionSpan(s, WeightId(draw(st.integers(0, 9)), draw(INTS))) for s in starts),
        reward=draw(SCALARS[float]),
        metrics=draw(st.dictionaries(TEXTS, SCALARS[float], max_size=3)),
        extras=draw(st.dictionaries(TEXTS, arrays(), max_size=3)),
    )


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=4)))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return array.T if draw(st.booleans()) else array  # also arrays that are not contiguous


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Whatever a field of this annotation may hold."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Trajectory:
        return trajectories()
    if annotation in SCALARS:
        return SCALARS[annotation]
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([values(a) for a in arguments])
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXTS, values(arguments[1]), max_size=3)
    hints = get_type_hints(annotation)
    names = annotation._fields if hasattr(annotation, "_fields") else [f.name for f in dataclasses.fields(annotation)]
    return st.builds(annotation, **{name: values(hints[name]) for name in names})


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, arrays in dtype, shape and bytes; a received trajectory equals the one sent."""
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b))
    if isinstance(a, Trajectory) and isinstance(b, Trajectory):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Trajectory))
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return bool(a == b)
