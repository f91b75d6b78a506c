"""The schema as a flat table: what errors, flags and the TOML writer need to know about every key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from slime_async.config.base import Section
from slime_async.config.schema import Config

PASS_THROUGH = ("sglang", "megatron")
"""Sections whose keys belong to others; their flags are ``--sglang-*`` and ``--megatron-*``"""


@dataclass(frozen=True, slots=True)
class Field:
    """One key that is not a section: ``section`` is empty for keys at the top."""

    section: str
    name: str
    info: FieldInfo

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def is_table(self) -> bool:
        """Whether its keys are the user's own (``[task.train.NAME]``, ``[sglang]``)."""
        return get_origin(self.info.annotation) is dict

    @property
    def is_text(self) -> bool:
        """Whether ``12`` on the command line means the text "12"."""
        return not set(scalar_types(self.info.annotation)) & {int, float, bool, dict, list, tuple, Any}

    @property
    def is_flag(self) -> bool:
        """Whether the flag may stand without a value."""
        return self.info.annotation is bool

    @property
    def kind(self) -> str:
        """What a value looks like, for ``--help``: ``INT``, ``{mask,drop}``, ``TABLE``."""
        literals = [str(v) for t in alternatives(self.info.annotation) if get_origin(t) is Literal for v in get_args(t)]
        if literals:
            return "{" + ",".join(literals) + "}"
        names = {int: "INT", float: "FLOAT", bool: "true|false", dict: "TABLE", list: "LIST", tuple: "LIST"}
        return names.get(scalar_types(self.info.annotation)[0], "TEXT")


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union other than None; a plain type is its only member."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for member in get_args(annotation) if member is not type(None)]
    return [annotation]


def scalar_types(annotation: Any) -> list[Any]:
    """The Python types behind an annotation, without generics, ``Annotated`` and ``Literal``."""
    found: list[Any] = []
    for member in alternatives(annotation):
        if get_origin(member) is Literal:
            found += [type(value) for value in get_args(member)]
        elif hasattr(member, "__metadata__"):
            found += scalar_types(member.__origin__)
        else:
            found.append(get_origin(member) or member)
    return found


def sections() -> dict[str, type[Section]]:
    """Our sections by name, in the schema's order."""
    return {
        name: info.annotation
        for name, info in Config.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    }


def fields() -> Iterator[Field]:
    """Every key of the schema, section by section; the pass-through sections come as one table each."""
    ours = sections()
    for name, info in Config.model_fields.items():
        if name in ours:
            for inner, inner_info in ours[name].model_fields.items():
                yield Field(name, inner, inner_info)
        else:
            yield Field("", name, info)


def nearest(key: str) -> str:
    """``did you mean max_staleness?`` for an unknown key, looking at its section first; the section's keys if none."""
    section, _, name = key.rpartition(".")
    siblings = [f.name for f in fields() if f.section == section] + ([] if section else list(sections()))
    for candidates, wanted in ((siblings, name), ([f.key for f in fields()], key)):
        if close := difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.7):
            return f"did you mean {close[0]}?"
    elsewhere = [f.key for f in fields() if f.name == name]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    if siblings:
        return f"{f'[{section}]' if section else 'the top level'} has {', '.join(siblings)}"
    return f"sections are {', '.join([*sections(), *PASS_THROUGH])}"
