"""What a scrape of each role gives, and what Grafana's dashboard asks for."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slime_async.config import ConfigError
from slime_async.config.schema import LoggersConfig
from slime_async.queue import QueueLimits, TaskStream, TrajectoryQueue
from slime_async.telemetry.exposition import ACTOR_HELP, COUNTERS, exported, exported_name, learner_names
from slime_async.telemetry.families import FAMILY_METRICS
from slime_async.telemetry.metrics import METRICS
from slime_async.telemetry.process import Process
from slime_async.telemetry.prometheus import served
from slime_async.transport.observer import SAMPLED
from tests.hub.players import make_config

NAME = re.compile(r"slime_async_(hub|actor|learner|process)(_[a-z0-9]+)*")
ON = LoggersConfig(prometheus=True)


def scrape(address: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels; parsing is strict about the format."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        family.name: {tuple(sorted(sample.labels.items())): sample.value for sample in family.samples}
        for family in text_string_to_metric_families(text)
    }


def process(role: str, **numbers: float | str) -> Process:
    made = Process(host="node-7")
    made.begin(role, f"{role}-0")
    made.tell("report", numbers)
    return made


def hub_statistics() -> dict[str, bool | int | float | str]:
    config = make_config()
    queue = TrajectoryQueue(QueueLimits.from_config(config), TaskStream.from_config(config))
    return queue.statistics(0.0).as_report()


def test_an_endpoint_serves_what_the_process_told_last(tmp_path: Path) -> None:
    actor = process("actor", weight_version=3, generated_tokens=70, engine="text is left out")
    with served(ON, actor, tmp_path, SAMPLED) as address:
        assert scrape(address)["slime_async_actor_weight_version"] == {(): 3.0}
        actor.tell("report", {"weight_version": 4, "generated_tokens": 90, "rollout/failed/TimeoutError": 2})
        actor.warned("something")
        found = scrape(address)
    assert found["slime_async_actor_weight_version"] == {(): 4.0}
    assert found["slime_async_actor_generated_tokens"] == {(): 90.0}
    assert found["slime_async_actor_rollout_failed"] == {(("kind", "TimeoutError"),): 2.0}
    assert found["slime_async_process_warnings"] == {(): 1.0}
    [labels] = found["slime_async_process_info"]
    assert dict(labels)["host"] == "node-7"
    assert "process_cpu_seconds" in found


def test_prometheus_finds_a_process_as_long_as_it_lives(tmp_path: Path) -> None:
    target = tmp_path / "prometheus" / "actor-0.json"
    with served(ON, process("actor"), tmp_path, SAMPLED) as address:
        labels = {"run": tmp_path.name, "role": "actor", "process": "actor-0"}
        assert json.loads(target.read_text()) == [{"targets": [address], "labels": labels}]
    assert not target.exists()


def test_processes_of_one_machine_take_the_next_free_port(tmp_path: Path) -> None:
    with served(ON, process("actor"), tmp_path, SAMPLED) as first:
        port = int(first.rpartition(":")[2])
        with served(ON.model_copy(update={"prometheus_port": port}), process("hub"), tmp_path, SAMPLED) as second:
            assert int(second.rpartition(":")[2]) > port


def test_an_address_that_is_not_this_machines_is_a_users_error(tmp_path: Path) -> None:
    config = ON.model_copy(update={"prometheus_address": "192.0.2.77"})
    with (
        pytest.raises(ConfigError, match=r"loggers.prometheus_address = '192.0.2.77'"),
        served(config, process("hub"), tmp_path, SAMPLED),
    ):
        pass


def test_nothing_listens_unless_asked(tmp_path: Path) -> None:
    with served(LoggersConfig(), process("hub"), tmp_path, SAMPLED) as address:
        assert address == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("role", "keys"), [("learner", [*METRICS, *FAMILY_METRICS]), ("hub", SAMPLED), ("actor", ACTOR_HELP)]
)
def test_names_follow_the_conventions(role: str, keys: list[str]) -> None:
    for key in keys:
        name = exported_name(role, key, key in COUNTERS)
        assert NAME.fullmatch(name), name
        assert not name.endswith(("_s", "_ms", "_mib")), f"{name} is not in a base unit"
        assert name.endswith("_total") == (key in COUNTERS)
    assert len({exported_name(role, key) for key in keys}) == len(list(keys))


def test_a_bucket_of_staleness_is_a_label() -> None:
    [bucket, age] = exported("learner", {"policy/k1/staleness_2-3": 0.5, "staleness/1": 7.0})
    assert (bucket.name, bucket.labels) == ("slime_async_learner_policy_k1_by_staleness", {"staleness": "2-3"})
    assert (age.name, age.labels) == ("slime_async_learner_sampled_tokens_by_staleness", {"staleness": "1"})


def test_the_dashboard_asks_only_for_what_exists() -> None:
    hub = {sample.name for sample in exported("hub", {**hub_statistics(), "actors": 1})}
    actor = {exported_name("actor", key, key in COUNTERS or key.startswith("rollout/")) for key in ACTOR_HELP}
    process_names = {"slime_async_process_info", "slime_async_process_warnings_total", "process_resident_memory_bytes"}
    known = {*hub, *actor, *process_names, *learner_names()}
    dashboard = json.loads((Path(__file__).parents[2] / "examples" / "grafana" / "slime-async.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    names = {name for expression in asked for name in re.findall(r"\b(?:slime_async|process)_\w+", expression)}
    assert len(asked) > 15
    assert names <= known, names - known
