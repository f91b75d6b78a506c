from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slime_async.bench.modes import configure, differences, modes_of
from slime_async.cli.bench_run import of_running_servers
from slime_async.config import Config, ConfigError, load_config
from slime_async.config.checks import complaints
from slime_async.report.run import flatten

TWO_GPUS = Path(__file__).parents[2] / "examples" / "bench" / "heavy_tailed_2gpus.toml"


def config(**bench: Any) -> Config:
    return Config.model_validate({"bench": bench, "evaluation": {"before": False, "after": False}})


def test_every_mode_gets_all_devices_and_separate_ones_share_none() -> None:
    modes = modes_of(config(devices=4, splits=["1:3"]))
    assert {mode.devices for mode in modes} == {(0, 1, 2, 3)}
    for mode in modes:
        shared = set(mode.learner_devices) & set(mode.actor_devices)
        assert bool(shared) == mode.colocated == (mode.name == "colocated")


def test_each_split_is_a_mode_of_its_own() -> None:
    modes = modes_of(config(devices=8, splits=["2:6", "6:2"], modes=["colocated", "async-2"]))
    assert [(m.name, len(m.learner_devices), len(m.actor_devices)) for m in modes] == [
        ("colocated", 8, 8),
        ("async-2 2:6", 2, 6),
        ("async-2 6:2", 6, 2),
    ]


def test_an_engine_of_several_devices_counts_once() -> None:
    sharded = config(devices=4, splits=["2:2"], modes=["async-1"]).model_copy(update={"sglang": {"tp_size": 2}})
    [mode] = modes_of(sharded)
    assert (mode.actor_devices, mode.devices, mode.layout) == ((2,), (0, 1, 2, 3), "2+2")


@pytest.mark.parametrize(
    ("bench", "message"),
    [
        ({"modes": ["asynchronous"]}, "no mode"),
        ({"modes": ["async-0"]}, "no mode"),
        ({"splits": ["1:2"]}, "add up to bench.devices = 2"),
        ({"splits": ["2:0"]}, "both at least 1"),
        ({"modes": ["async-1", "async-1"]}, "more than once"),
    ],
)
def test_what_cannot_be_compared_is_refused(bench: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        modes_of(config(**bench))


def test_the_modes_configurations_differ_in_what_a_mode_is_and_nowhere_else(tmp_path: Path) -> None:
    base = config()
    flat = [flatten(configure(base, mode, tmp_path, 60).model_dump(mode="json")) for mode in modes_of(base)]
    assert all(differences(flat[0], other) == [] for other in flat)
    assert [one["staleness.max_staleness"] for one in flat] == [0, 0, 1, 1, 2, 4, 8]
    assert [one["weights.publish"] for one in flat].count("batch_boundary") == 1


def test_any_other_difference_is_named() -> None:
    assert differences({"learner.learning_rate": 1.0, "run.name": "a"}, {"learner.learning_rate": 2.0}) == [
        "learner.learning_rate"
    ]


def test_a_run_on_running_servers_is_given_nothing_that_belongs_to_their_start() -> None:
    config = load_config(TWO_GPUS, {("sglang", "api_key"): "secret"})
    own = of_running_servers(config)
    urls = own.actor.model_copy(update={"count": 1, "engine_urls": ("http://127.0.0.1:1",)})
    assert own.sglang == {"api_key": "secret"}
    assert not [c for c in complaints(own.model_copy(update={"actor": urls})) if "sglang" in c]
