"""What is wrong between nodes: made-up ones, and real reports over a real socket."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from slime_async.cli.doctor_nodes import Collector, report
from slime_async.cli.main import main
from slime_async.config import Config, ConfigError, RunConfig
from slime_async.doctor.cluster import check_cluster
from slime_async.doctor.finding import Finding, warning
from slime_async.doctor.node import Node, Probe

SOUND = Probe(clock_offset_s=0.01, clock_error_s=0.001, reached_back=True, sees_shared=True)
NODE = Node(
    "n1", "3.12.1", {"torch": "2.13.0", "rich": "14"}, {"NCCL_DEBUG": "WARN"}, ["580.1"], ["H200"], 900.0, SOUND, []
)


def pair(**changes: object) -> list[Node]:
    return [NODE, replace(NODE, host="n2", **changes)]  # type: ignore[arg-type]


def bad(nodes: list[Node], wanted: int = 2) -> list[tuple[str, str, str]]:
    found = check_cluster(Config(), nodes, wanted)
    return [(finding.level, finding.subject, finding.text) for finding in found if finding.level != "ok"]


@pytest.mark.parametrize(
    ("nodes", "level", "subject", "text"),
    [
        ([NODE], "error", "nodes", "only 1 of 2 reported: n1"),
        (
            pair(packages={"torch": "2.11.0", "rich": "14"}),
            "error",
            "versions",
            "torch differs: 2.13.0 on n1; 2.11.0 on",
        ),
        (pair(packages={"torch": "2.13.0"}), "warning", "versions", "rich differs: 14 on n1; missing on n2"),
        (pair(variables={}), "error", "variables", "NCCL_DEBUG differs: WARN on n1; not set on n2"),
        (pair(drivers=["570.9"]), "warning", "driver", "differs"),
        (pair(probe=replace(SOUND, clock_offset_s=-3.0)), "warning", "clocks", "up to 3.010 s apart"),
        (pair(probe=replace(SOUND, reached_back=False)), "error", "ports", "n2 cannot be reached on a free port"),
        (pair(probe=replace(SOUND, sees_shared=False)), "error", "shared directory", "is not the same directory on n2"),
        (pair(findings=[warning("disk", "5 GiB", "make room")]), "warning", "n2: disk", "5 GiB"),
    ],
)
def test_each_difference_is_found_and_has_a_remedy(nodes: list[Node], level: str, subject: str, text: str) -> None:
    [found] = bad(nodes)
    assert found[:2] == (level, subject)
    assert text in found[2]


def test_equal_nodes_are_fine() -> None:
    assert bad(pair()) == []


def test_what_names_a_machines_own_devices_may_differ() -> None:
    [found] = bad(pair(variables={"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "ib1"}))
    assert found[0] == "warning"


def test_the_same_finding_of_many_nodes_is_told_once() -> None:
    same = Finding("error", "driver", "too old", "update it")
    [found] = bad([replace(NODE, host=f"n{i}", findings=[same]) for i in range(9)], 9)
    assert found[1] == "n0, n1, n2, n3 and 5 more: driver"


def test_nodes_report_over_the_network(tmp_path: Path) -> None:
    config = Config(run=RunConfig(directory=tmp_path / "runs"))
    finding = warning("memory", "little", "use more")

    async def play() -> list[Node]:
        async def both(address: str) -> None:
            await asyncio.gather(*(report(config, address, [finding]) for _ in range(2)))

        return await Collector(config, 2).collect("127.0.0.1", 0, both, 30)

    nodes = asyncio.run(play())
    assert len(nodes) == 2
    for node in nodes:
        assert node.findings == [finding]
        assert node.probe.reached_back
        assert node.probe.sees_shared
        assert abs(node.probe.clock_offset_s) <= node.probe.clock_error_s + 0.05  # one clock
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_collector_that_is_not_there_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"cannot reach the collector at 127\.0\.0\.1:9"):
        asyncio.run(report(Config(), "127.0.0.1:9", []))


def test_nodes_that_never_report_are_missed(tmp_path: Path) -> None:
    config = Config(run=RunConfig(directory=tmp_path))
    nodes = asyncio.run(Collector(config, 1).collect("127.0.0.1", 0, lambda _: None, 0.01))
    assert bad(nodes, 1)[0][2] == "only 0 of 1 reported: none"


def test_the_doctor_of_a_slurm_job_says_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["doctor", "--launcher", "slurm"]) == 2
    assert "salloc" in capsys.readouterr().err
