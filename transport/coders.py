"""From type annotations to coders: how each type of field looks on the wire, and what is checked when it comes back.

==============================  =====================================================================
annotation                      on the wire (msgpack)
==============================  =====================================================================
int, float, str, bool, bytes    the same; ints within 64 signed bits
Literal[…], X | None            one of the values; nil or X
bool | int | float | str        any one of them
tuple[X, …], NamedTuple         array
dict[str, X]                    map
dataclass                       map of all its fields by name
A | B of dataclasses            array [class name, map]
NDArray[dtype]                  array [dtype, [shape]]; its bytes are the next ones in the message's raw frames.
                                With a concrete dtype it is a column (one dimension); NDArray[np.generic] takes
                                any allowed dtype and up to ``Limits.dimensions`` dimensions
==============================  =====================================================================

A coder is compiled once per type. Encoders append arrays to a list; decoders take them from a ``Frames`` cursor in the
same order. Whatever comes in, decoders raise ``BadMessage`` and nothing else, before they allocate.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import reprlib
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from slime_async.transport.buffers import DEFAULT_LIMITS, Buffer, Frames
from slime_async.transport.errors import BadMessage

INT_MAX = 2**63 - 1
_DTYPE_NAMES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"  # no objects, text or dates
)
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name).newbyteorder("<") for name in _DTYPE_NAMES.split()}
NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}


Encode = Callable[[Any, list[Buffer]], Any]
Decode = Callable[[Any, Frames], Any]


class Coder(NamedTuple):
    """``encode`` is ``None`` where msgpack takes the value as it is."""

    encode: Encode | None
    decode: Decode
    plain: type | None = None
    """The type that says all: such a value is right as it came if its type is this (and an int has 64 bits)"""


def wants(wanted: str, value: object) -> BadMessage:
    return BadMessage(f"wants {wanted}, got {type(value).__name__} {reprlib.repr(value)}")


# -------------------------------------------------------------------------------------------------- scalars


def _decode_int(raw: Any, _: Frames) -> int:
    if type(raw) is not int or raw > INT_MAX:
        raise wants("a 64-bit int", raw)
    return raw


def _exactly(kind: type) -> Decode:
    def decode(raw: Any, _: Frames) -> Any:
        if type(raw) is not kind:
            raise wants(kind.__name__, raw)
        return raw

    return decode


def _encode_float(value: Any, _: list[Buffer]) -> float:
    if isinstance(value, (int, np.number)):
        return float(value)
    return cast(float, value)  # anything else is msgpack's to take, and the receiver's to refuse


def _decode_scalar(raw: Any, frames: Frames) -> bool | int | float | str:
    if type(raw) not in (bool, int, float, str):
        raise wants("a bool, int, float or str", raw)
    return _decode_int(raw, frames) if type(raw) is int else raw


def _literal(values: tuple[Any, ...]) -> Coder:
    kinds = {type(v) for v in values}

    def decode(raw: Any, _: Frames) -> Any:
        if type(raw) not in kinds or raw not in values:
            raise wants(" or ".join(map(repr, values)), raw)
        return raw

    return Coder(None, decode)


# -------------------------------------------------------------------------------------------------- containers


def _optional(inner: Coder) -> Coder:
    encode_inner, decode_inner, _ = inner

    def encode(value: Any, frames: list[Buffer]) -> Any:
        return value if value is None or encode_inner is None else encode_inner(value, frames)

    return Coder(encode, lambda raw, frames: None if raw is None else decode_inner(raw, frames))


def _all_plain(values: Collection[Any], kind: type | None) -> bool:
    """Whether nothing is left to check in any of them; done without a call for each."""
    if kind is None or set(map(type, values)) - {kind}:
        return False
    return kind is not int or max(values, default=0) <= INT_MAX


def _sequence(item: Coder) -> Coder:
    encode_item, decode_item, plain = item

    def encode(value: Any, frames: list[Buffer]) -> Any:
        assert encode_item is not None
        return [encode_item(v, frames) for v in value]

    def decode(raw: Any, frames: Frames) -> tuple[Any, ...]:
        if type(raw) is not list:
            raise wants("an array", raw)
        if _all_plain(raw, plain):
            return tuple(raw)
        done: list[Any] = []
        try:
            for entry in raw:
                done.append(decode_item(entry, frames))
        except BadMessage as bad:
            raise bad.within(f"[{len(done)}]") from None
        return tuple(done)

    return Coder(None if encode_item is None else encode, decode)


def _mapping(item: Coder) -> Coder:
    encode_item, decode_item, _ = item

    def encode(value: Any, frames: list[Buffer]) -> Any:
        assert encode_item is not None
        raw: dict[str, Any] = {}
        for key, entry in value.items():
            try:
                raw[key] = encode_item(entry, frames)
            except BadMessage as bad:
                raise bad.within(f"[{key[:80]!r}]") from None
        return raw

    def decode(raw: Any, frames: Frames) -> dict[str, Any]:
        if type(raw) is not dict:
            raise wants("a map", raw)
        for key, entry in raw.items():
            if type(key) is not str:
                raise wants("str as key", key)
            try:
                raw[key] = decode_item(entry, frames)
            except BadMessage as bad:
                raise bad.within(f"[{key[:80]!r}]") from None
        return raw

    return Coder(None if encode_item is None else encode, decode)


def _compiled(source: str, names: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """The function ``made`` that ``source`` defines: a line per field runs faster than a loop over the fields.

    As ``dataclasses`` does it; the source comes from our annotations, never from what came in.
    """
    exec(source, names)
    made: Callable[[Any, Any], Any] = names["made"]
    return made


def _named_tuple(kind: Any) -> Coder:
    names: tuple[str, ...] = kind._fields
    hints = get_type_hints(kind)
    coders = [coder(hints[n]) for n in names]
    if any(c.encode is not None for c in coders):
        raise TypeError(f"{kind.__name__} needs coding: only tuples of ints, strs and such tuples go as they are")

    def refused(raw: Any) -> BadMessage:
        return wants(f"{kind.__name__}({', '.join(names)})", raw)

    wrong = f"type(raw) is not list or len(raw) != {len(names)}"
    build = functools.partial(tuple.__new__, kind)  # as _make does, without a call of Python's
    return Coder(None, _decoder(names, coders, wrong, refused, "raw", build, "build([{}])"))


def fields_coder(cls: Any, build: Callable[..., Any]) -> Coder:
    """The map of a dataclass's fields; ``build`` is called with their values in order."""
    hints = get_type_hints(cls)
    names = tuple(f.name for f in dataclasses.fields(cls))
    coders = [coder(hints[n]) for n in names]

    def refused(raw: Any) -> BadMessage:
        if type(raw) is not dict:
            return wants(f"a map of {cls.__name__}'s fields", raw)
        return BadMessage(f"{cls.__name__} has fields {list(names)} in this order, got {reprlib.repr(list(raw))}")

    wrong = f"type(raw) is not dict or (*raw,) != {names}"
    return Coder(_encoder(cls, names, coders), _decoder(names, coders, wrong, refused, "raw.values()", build))


def _encoder(cls: Any, names: Sequence[str], coders: Sequence[Coder]) -> Encode:
    """Of a dataclass: the map of its fields."""
    given: dict[str, Any] = {"cls": cls, "names": names, "wants": wants, "BadMessage": BadMessage}
    steps: list[str] = []
    for i, (name, c) in enumerate(zip(names, coders, strict=True)):
        steps.append(f"v{i} = value.{name}")
        if c.encode is not None:
            given |= {f"plain{i}": c.plain, f"encode{i}": c.encode}
            unless_plain = f"if type(v{i}) is not plain{i}: " if c.plain else ""
            steps.append(f"{unless_plain}at = {i}; v{i} = encode{i}(v{i}, frames)")
    body = "\n        ".join(steps or ["pass"])
    entries = ", ".join(f"{name!r}: v{i}" for i, name in enumerate(names))
    return _compiled(
        f"""
def made(value, frames):
    if not isinstance(value, cls):
        raise wants(cls.__name__, value)
    at = 0
    try:
        {body}
    except BadMessage as bad:
        raise bad.within(names[at]) from None
    return {{{entries}}}
""",
        given,
    )


def _decoder(
    names: Sequence[str],
    coders: Sequence[Coder],
    wrong: str,
    refused: Callable[[Any], BadMessage],
    values: str,
    build: Callable[..., Any],
    result: str = "build({})",
) -> Decode:
    """Of one value per name: raises ``refused(raw)`` if ``wrong``, decodes each of ``values``; they go into ``result``.

    Most are plain: looking at their type saves a call for each.
    """
    given: dict[str, Any] = {"names": names, "refused": refused, "build": build, "BadMessage": BadMessage}
    variables = [f"v{i}" for i in range(len(names))]
    steps: list[str] = []
    for i, (v, c) in enumerate(zip(variables, coders, strict=True)):
        given |= {f"plain{i}": c.plain, f"decode{i}": c.decode}
        too_large = f" or {v} > {INT_MAX}" if c.plain is int else ""
        unless_plain = f"if type({v}) is not plain{i}{too_large}: " if c.plain else ""
        steps.append(f"{unless_plain}at = {i}; {v} = decode{i}({v}, frames)")
    body = "\n        ".join(steps or ["pass"])
    return _compiled(
        f"""
def made(raw, frames):
    if {wrong}:
        raise refused(raw)
    [{", ".join(variables)}] = {values}
    at = 0
    try:
        {body}
    except BadMessage as bad:
        raise bad.within(names[at]) from None
    try:
        return {result.format(", ".join(variables))}
    except ValueError as error:
        raise BadMessage(str(error)) from None
""",
        given,
    )


def union(kinds: Sequence[Any]) -> Coder:
    """One of several dataclasses, by name."""
    by_name = {k.__name__: coder(k) for k in kinds}
    by_kind = {k: (k.__name__, coder(k).encode) for k in kinds}

    def encode(value: Any, frames: list[Buffer]) -> Any:
        if type(value) not in by_kind:
            raise wants(" or ".join(by_name), value)
        name, encode_fields = by_kind[type(value)]
        assert encode_fields is not None
        try:
            return [name, encode_fields(value, frames)]
        except BadMessage as bad:
            raise bad.within(name) from None

    def decode(raw: Any, frames: Frames) -> Any:
        if type(raw) is not list or len(raw) != 2 or type(raw[0]) is not str:
            raise wants("[kind, fields]", raw)
        found = by_name.get(raw[0])
        if found is None:
            raise BadMessage(f"{reprlib.repr(raw[0])} is none of the kinds {', '.join(by_name)}")
        try:
            return found.decode(raw[1], frames)
        except BadMessage as bad:
            raise bad.within(raw[0]) from None

    return Coder(encode, decode)


# -------------------------------------------------------------------------------------------------- arrays


def _array(wanted: np.dtype[Any] | None) -> Coder:
    """Any array, or a column of ``wanted``."""
    most_dimensions = None if wanted is None else 1
    names = NAMES if wanted is None else {wanted: NAMES[wanted]}
    dtypes = {name: dtype for dtype, name in names.items()}

    def encode(value: Any, frames: list[Buffer]) -> Any:
        if not isinstance(value, np.ndarray):
            raise wants("a numpy array", value)
        dtype, shape = value.dtype, value.shape
        name = names.get(dtype)
        if name is None:
            raise BadMessage(f"wants dtype {wanted or f'among {_DTYPE_NAMES}'}, got {dtype.str}: convert it first")
        if wanted is not None and len(shape) != 1:
            raise BadMessage(f"wants one dimension, got shape {shape}")
        if not 1 <= len(shape) <= DEFAULT_LIMITS.dimensions:
            raise BadMessage(f"has shape {shape}: too few or too many dimensions")
        if value.size:
            frames.append(value.data if value.flags.c_contiguous else np.ascontiguousarray(value).data)
        return name, shape

    def decode(raw: Any, frames: Frames) -> Any:
        if type(raw) is not list or len(raw) != 2 or type(raw[0]) is not str or type(raw[1]) is not list:
            raise wants("[dtype, shape]", raw)
        name, shape = raw
        dtype = dtypes.get(name)
        if dtype is None:
            raise BadMessage(f"wants dtype {wanted or f'among {_DTYPE_NAMES}'}, got {reprlib.repr(name)}")
        if not 1 <= len(shape) <= (most_dimensions or frames.limits.dimensions):
            raise BadMessage(f"has shape {reprlib.repr(shape)}: too few or too many dimensions")
        size = dtype.itemsize
        for n in shape:
            if type(n) is not int or n < 0:
                raise wants("lengths ≥ 0 as shape", shape)
            size *= n
        array = np.frombuffer(frames.take(size), dtype)  # read-only, as the frame is
        if not array.flags.aligned:  # small messages come at any address of the socket's read buffer
            array = array.copy()
            array.flags.writeable = False
        return array if len(shape) == 1 else array.reshape(shape)

    return Coder(encode, decode)


# -------------------------------------------------------------------------------------------------- compiler

_SCALARS: dict[Any, Coder] = {
    int: Coder(None, _decode_int, int),
    float: Coder(_encode_float, _exactly(float), float),
    **{kind: Coder(None, _exactly(kind), kind) for kind in (bool, str, bytes)},
}
_CUSTOM: dict[Any, Coder] = {}


def register(kind: type, custom: Coder) -> None:
    """Code ``kind`` in a form of its own, wherever an annotation names it."""
    _CUSTOM[kind] = custom


@functools.cache
def coder(annotation: Any) -> Coder:
    """The coder of one annotation. Raises ``TypeError`` for one that has no form on the wire."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _CUSTOM:
        return _CUSTOM[annotation]
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if origin is Literal:
        return _literal(arguments)
    if origin in (Union, types.UnionType):
        return _union_of(annotation, arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _sequence(coder(arguments[0]))
    if origin is dict and arguments[0] is str:
        return _mapping(coder(arguments[1]))
    if origin is np.ndarray:  # NDArray[scalar], spelt out by NumPy before 2.5
        return _array_of(get_args(arguments[1])[0])
    if origin is NDArray:  # an alias of its own since
        return _array_of(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields"):
        return _named_tuple(annotation)
    if dataclasses.is_dataclass(annotation):
        return fields_coder(annotation, annotation)  # type: ignore[arg-type]  # a class: instances are no annotations
    raise TypeError(f"{annotation} has no form on the wire; see the table in {__name__}")


def _array_of(scalar: Any) -> Coder:
    return _array(None if scalar is np.generic else np.dtype(scalar))


def _union_of(annotation: Any, arguments: tuple[Any, ...]) -> Coder:
    some = tuple(a for a in arguments if a is not type(None))
    if len(some) < len(arguments):
        return _optional(coder(some[0] if len(some) == 1 else functools.reduce(operator.or_, some)))
    if set(some) == {bool, int, float, str}:
        return Coder(None, _decode_scalar)
    if all(dataclasses.is_dataclass(a) for a in some):
        return union(some)
    raise TypeError(f"{annotation} has no form on the wire: unions are of dataclasses or of bool, int, float and str")
