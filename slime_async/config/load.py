"""From a TOML file and flags to a frozen ``Config``; every problem found is one line of one ``ConfigError``.

File and flags meet as one table before validation, so both are checked, and complained about, in the same way::

    demo.toml ──► table ──┐
                          ├── merge ──► pydantic ──► checks between fields ──► Config
    flags ──► overrides ──┘
"""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from slime_async.config.checks import complaints
from slime_async.config.errors import ConfigError
from slime_async.config.fields import nearest
from slime_async.config.schema import Config

Key = tuple[str, ...]
"""A path into the table: ("learner", "learning_rate")"""


def load_config(path: Path, overrides: Mapping[Key, Any] | None = None) -> Config:
    """Read ``path``, put ``overrides`` (from flags) over it, and check everything.

    Raises ``ConfigError`` for a missing or malformed file, unknown keys, wrong values and values that clash.
    """
    return make_config(read_toml(path), overrides or {}, file=str(path))


def make_config(table: Mapping[str, Any], overrides: Mapping[Key, Any], file: str) -> Config:
    """As ``load_config``, for a table that was read already; ``file`` is its name in errors."""
    merged = merge(table, overrides)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigError("\n".join(describe(problem, overrides, file) for problem in problems)) from None
    if clashes := complaints(config):
        raise ConfigError("\n".join(f"{file}: {clash}" for clash in clashes))
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """The file as a table. Raises ``ConfigError`` that names the file, and the line for bad syntax."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        here = f" (looked from {os.getcwd()})" if not path.is_absolute() else ""
        raise ConfigError(
            f"no configuration file {path}{here}: give the path of a TOML file, such as examples/demo.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {path}: {error.strerror}") from None


def merge(table: Mapping[str, Any], overrides: Mapping[Key, Any]) -> dict[str, Any]:
    """A copy of ``table`` with every override in its place, making sections on the way."""
    merged = copy.deepcopy(dict(table))
    for key, value in overrides.items():
        place = merged
        for part in key[:-1]:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"flag {flag_name(key)} goes into {part}, which is {inner!r} and not a table")
            place = inner
        place[key[-1]] = value
    return merged


def flag_name(key: Key) -> str:
    """How a key is spelled as a flag."""
    separator = "-" if key[0] in ("sglang", "megatron") else "."
    return "--" + separator.join([key[0], ".".join(key[1:])] if len(key) > 1 else key).replace("_", "-")


def describe(problem: ErrorDetails, overrides: Mapping[Key, Any], file: str) -> str:
    """One line for one of pydantic's findings: where, what it is, and what it should be."""
    key = tuple(str(part) for part in problem["loc"] if part != "[key]")
    name = ".".join(key)
    near = key[:-1] if problem["type"] == "missing" else key
    flag = next((k for k in overrides if k[: len(near)] == near or near[: len(k)] == k), None)
    where = f"flag {flag_name(flag)}" if flag else file
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name} in {where}: {nearest(name)}"
    if problem["type"] == "missing":
        return f"{where}: {name} is missing: it must be set"
    wanted = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], Mapping):
        return f"{where}: [{name}]: {wanted}"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{where}: {name} = {problem['input']!r} is wrong: {name} is a section, write keys under [{name}]"
    return f"{where}: {name} = {problem['input']!r} is wrong: should be {wanted}"
