"""The resolved configuration as TOML, and the schema's documentation."""

from __future__ import annotations

import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from slime_async.config import Config, dump_toml
from slime_async.config.fields import fields, sections

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = TEXT | st.integers(-(2**62), 2**62) | st.booleans() | st.floats(allow_nan=False)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


def reloaded(config: Config) -> Config:
    return Config.model_validate(tomllib.loads(dump_toml(config)))


def test_a_dumped_configuration_loads_back_equal() -> None:
    config = Config.model_validate(
        {
            "run": {"name": 'a"b\\c\x7f\n', "directory": Path("/tmp/runs")},
            "task": {
                "train": {"held-out 1": {"factory": "a:b", "arguments": {"n": 3, "list": [1.5, "x"]}, "weight": 2.5}},
                "epochs": 3,
            },
            "batch": {"queue_trajectories": 1024},
            "learner": {"learning_rate": 1e-7},
            "sglang": {"tp_size": 2, "nested": {"a": [{"b": True}]}},
        }
    )
    assert reloaded(config) == config
    assert reloaded(Config()) == Config()


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_any_pass_through_table_survives(table: dict[str, object]) -> None:
    config = Config(megatron=table)
    assert reloaded(config) == config


def test_the_dump_shows_every_field() -> None:
    text = dump_toml(Config())
    for field in fields():
        assert (
            f"[{field.key}]" in text if field.is_table else f"{field.name} = " in text or f"# {field.name} is" in text
        )


def test_every_section_and_field_is_documented() -> None:
    bare = [name for name, section in sections().items() if not section.__doc__]
    bare += [field.key for field in fields() if not (field.info.description or "").strip()]
    assert bare == [], "give each a docstring: it is its --help"
