"""Every key of the configuration as a flag, on top of argparse.

``--learner.learning-rate 1e-4``; hyphens and underscores are one; tables take their keys as further parts
(``--task.train.sort.weight 2``, ``--sglang-mem-fraction-static 0.8``); values are TOML, and text needs no quotes.
argparse, because it is fast to import, and because values then meet the file's table before pydantic sees them: one
check and one wording for both (tyro builds the objects itself, and has no place for pass-through flags).
"""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Sequence
from typing import Any, NoReturn

from slime_async.config import Config, ConfigError
from slime_async.config.fields import PASS_THROUGH, Field, fields, sections
from slime_async.config.load import Key

CONFIG_USAGE = "[--SECTION.FIELD VALUE ...] [--sglang-ARGUMENT VALUE ...] [--megatron-FIELD VALUE ...]"
"""In place of a list of all flags"""
PASS_THROUGH_HELP = "Any {whose}, by its own name; without a value it is true"
PASS_THROUGH_NAMES = {"sglang": "argument of SGLang's servers", "megatron": "field of Megatron's configs"}


class FlagParser(argparse.ArgumentParser):
    """A parser that raises ``ConfigError`` instead of leaving, and suggests the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_strictly(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all of ``arguments``; an unknown flag is an error that names the nearest."""
        declare_table_flags(self, arguments)
        known, unknown = self.parse_known_args([spelled(argument) for argument in arguments])
        flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        if flags:
            raise ConfigError("\n".join(f"unknown flag {flag}: {self._nearest(flag)}" for flag in flags))
        if unknown:
            raise ConfigError(f"unexpected argument {unknown[0]!r} (see {self.prog} --help)")
        return known

    def _nearest(self, flag: str) -> str:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        if close := difflib.get_close_matches(flag, known, n=1, cutoff=0.7):
            return f"did you mean {close[0]}?"
        last = flag.lstrip("-").rpartition(".")[2]
        if inside := [name for name in known if name.rpartition(".")[2].lstrip("-") == last]:
            return f"did you mean {inside[0]}?"
        return f"{self.prog} --help lists all"


def spelled(argument: str) -> str:
    """A flag as it was declared: hyphens for underscores, but only in the flag, never in its value."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    table = table_key(flag)
    return (_table_flag(table) if table else flag.replace("_", "-")) + equals + value


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Declare a flag for each field, grouped by section; its docstring is its help."""
    positional = " ".join(str(action.metavar) for action in parser._actions if not action.option_strings)
    parser.usage = f"%(prog)s {positional} {CONFIG_USAGE}"
    groups = {
        name: parser.add_argument_group(f"[{name}]", " ".join((section.__doc__ or "").split()))
        for name, section in sections().items()
    }
    defaults = Config()
    for field in fields():
        if field.name in PASS_THROUGH:
            text = PASS_THROUGH_HELP.format(whose=PASS_THROUGH_NAMES[field.name])
            group = parser.add_argument_group(f"[{field.name}]", field.info.description)
            group.add_argument(f"--{field.name}-*", metavar="VALUE", dest="_", help=text)
        else:
            default = getattr(getattr(defaults, field.section), field.name)
            _add_flag(groups[field.section], field, default)


def _add_flag(group: argparse._ArgumentGroup, field: Field, default: Any) -> None:
    shown = "not set" if default in (None, "", {}) else str(default).lower() if field.is_flag else str(default)
    suffix = ".NAME.KEY" if field.is_table else ""
    description = " ".join((field.info.description or "").split()).replace("%", "%%")
    options: dict[str, Any] = {"nargs": "?", "const": True} if field.is_flag else {}
    group.add_argument(
        f"--{field.key.replace('_', '-')}{suffix}",
        dest=f"{field.section}/{field.name}",
        metavar=field.kind.replace("TABLE", "VALUE") if suffix else field.kind,
        default=argparse.SUPPRESS,
        type=toml_text if field.is_text else toml_value,
        help=f"{description} [{shown}]",
        **options,
    )


def declare_table_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Declare those flags among ``arguments`` whose keys are the user's own or another program's."""
    for argument in arguments:
        key = table_key(argument.partition("=")[0])
        if key and _table_flag(key) not in parser._option_string_actions:
            parser.add_argument(
                _table_flag(key),
                dest="/".join(key),
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                type=toml_value,
                help=argparse.SUPPRESS,
            )


def table_key(flag: str) -> Key | None:
    """``--sglang-tp-size`` → ("sglang", "tp_size"); ``--task.train.sort.weight`` → its four parts; else None."""
    name = flag.removeprefix("--")
    if name == flag:
        return None
    for section in PASS_THROUGH:
        if name.startswith((f"{section}-", f"{section}_", f"{section}.")):
            return (section, name[len(section) + 1 :].replace("-", "_"))
    parts = tuple(name.split("."))
    tables = {(field.section, field.name) for field in fields() if field.is_table}
    return parts if parts[:2] in tables and "NAME" not in parts else None


def _table_flag(key: Key) -> str:
    return f"--{key[0]}-{key[1]}" if key[0] in PASS_THROUGH else "--" + ".".join(key)


def overrides(parsed: argparse.Namespace) -> dict[Key, Any]:
    """What the configuration flags said, by key."""
    return {tuple(name.split("/")): value for name, value in vars(parsed).items() if "/" in name}


def toml_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none: ``0.8``, ``[1, 2]``, ``{a = 1}``, ``fa3``, ``True``."""
    if text in ("True", "False"):
        return text == "True"
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def toml_text(text: str) -> str:
    """Text; quotes as in TOML may be there or not."""
    value = toml_value(text) if text[:1] in ("'", '"') else text
    return value if isinstance(value, str) else text
