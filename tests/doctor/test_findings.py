"""What the doctor says of made-up machines: (what is there, what it finds)."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

import pytest

from slime_async.cli.doctor import examine
from slime_async.cli.main import main
from slime_async.config import Config
from slime_async.doctor import machine
from slime_async.doctor.devices import TorchBuild, check_devices
from slime_async.doctor.finding import Finding
from slime_async.doctor.machine import check_machine, check_network
from slime_async.doctor.packages import check_packages
from slime_async.doctor.variables import check_variables
from slime_async.telemetry import environment
from slime_async.telemetry.environment import Gpu, describe_environment, parse_gpus, query_gpus

H200 = Gpu("NVIDIA H200", 143771, 500, "570.133.20")
BUSY = Gpu("NVIDIA H200", 143771, 90000, "570.133.20")


def bad(found: Iterable[Finding]) -> list[tuple[str, str]]:
    """(level, subject) of everything that is not in order."""
    return [(finding.level, finding.subject) for finding in found if finding.level != "ok"]


@pytest.mark.parametrize(
    ("gpus", "torch", "files", "wanted"),
    [
        ([], TorchBuild(None, 0), False, []),
        ([], TorchBuild("12.8", 0), False, []),
        ([], TorchBuild("12.8", 0), True, [("error", "GPU")]),
        ([H200], TorchBuild("12.8", 1), True, []),
        ([H200], TorchBuild("13.0", 0), True, [("error", "driver")]),
        ([H200], TorchBuild(None, 0), True, [("warning", "torch")]),
        ([H200, BUSY], TorchBuild("12.8", 1), True, [("warning", "GPU"), ("warning", "torch")]),
        ([], "libcudart.so.12: cannot open shared object file", False, [("error", "torch")]),
    ],
)
def test_devices(gpus: list[Gpu], torch: TorchBuild | str, files: bool, wanted: list[tuple[str, str]]) -> None:
    assert bad(check_devices(gpus, torch, files)) == wanted


PACKAGES = {"slime-async": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6", "openai": "2.54.0"}


@pytest.mark.parametrize(
    ("changes", "needs", "texts"),
    [
        ({}, {}, []),
        ({"torch": "2.10.0"}, {}, ["slime-async needs torch>=2.11, but 2.10.0 is installed"]),
        ({"numpy": None}, {}, ["numpy is missing"]),
        ({"sglang": "0.5.16"}, {}, ["SGLang 0.5.16 belongs to torch 2.11.0, but 2.13.0+cpu is installed"]),
        ({"sglang": "0.5.20"}, {}, []),
        ({"sglang": "0.6.0"}, {}, ["SGLang 0.6.0 was never run with this project"]),
        (
            {"sglang": "0.5.20"},
            {"sglang": ["openai==2.8.0"]},
            ["sglang needs openai==2.8.0, but 2.54.0 is installed"],
        ),
        ({}, {"torch": ["nvidia-nccl==2; extra == 'cuda'", "missing-optional>1"]}, []),
    ],
)
def test_packages(changes: dict[str, str | None], needs: dict[str, list[str]], texts: list[str]) -> None:
    installed = {**PACKAGES, **changes}
    requirements = {"slime-async": ["torch>=2.11", "numpy>=1.26", "wandb>=0.19; extra == 'wandb'"], **needs}
    found = list(check_packages(installed.get, lambda name: requirements.get(name, []), (3, 11, 7)))
    assert [finding.text for finding in found if finding.level != "ok"] == texts


def test_an_old_python_is_an_error() -> None:
    assert bad(check_packages(PACKAGES.get, lambda _: [], (3, 10, 1))) == [("error", "Python")]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, []),
        ({"NCCL_CUMEM_ENABLE": "0"}, []),
        ({"NCCL_CUMEM_ENABLE": "1"}, [("error", "variables")]),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "info"}, [("warning", "variables")] * 2),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, [("error", "variables")]),
        ({"CUDA_VISIBLE_DEVICES": ""}, [("warning", "variables")]),
        ({"NCCL_SOCKET_IFNAME": "eth"}, []),
        ({"NCCL_SOCKET_IFNAME": "^docker0"}, []),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, [("warning", "variables")]),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, [("warning", "variables")]),
    ],
)
def test_variables(variables: dict[str, str], wanted: list[tuple[str, str]]) -> None:
    assert bad(check_variables(variables, ["lo", "eth0"])) == wanted


def with_address(address: str) -> Config:
    config = Config()
    return config.model_copy(update={"hub": config.hub.model_copy(update={"address": address})})


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        found = [
            finding for finding in check_network(with_address(f"tcp://127.0.0.1:{port}")) if finding.subject == "ports"
        ]
    assert [finding.level for finding in found] == ["error"]
    assert "ss -ltnp" in found[0].remedy


def test_a_small_machine_is_told_apart_from_a_large_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": tmp_path / "runs"})})
    monkeypatch.setattr(machine, "usable_cpus", lambda: 1)
    monkeypatch.setattr(machine, "memory_gib", lambda: 2.0)
    monkeypatch.setattr(machine, "DISK_ERROR_GIB", 1e9)
    found = bad(check_machine(config))
    assert [f for f in found if f[1] != "open files"][:3] == [
        ("warning", "CPU cores"),
        ("warning", "memory"),
        ("error", "disk"),
    ]
    monkeypatch.setattr(machine, "usable_cpus", lambda: 64)
    monkeypatch.setattr(machine, "memory_gib", lambda: 512.0)
    monkeypatch.setattr(machine, "DISK_ERROR_GIB", 0.0)
    monkeypatch.setattr(machine, "DISK_WARNING_GIB", 0.0)
    monkeypatch.setattr(machine, "SHM_GIB", 0.0)
    monkeypatch.setattr(machine, "OPEN_FILES", 0)
    assert bad(check_machine(config)) == []


def test_the_exit_code_is_for_scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def found(level: str) -> None:
        finding = Finding(level, "disk", "full", "make room")  # type: ignore[arg-type]
        monkeypatch.setattr("slime_async.cli.doctor.examine", lambda _config: [finding])

    for level, plain, strict in (("ok", 0, 0), ("warning", 0, 1), ("error", 1, 1)):
        found(level)
        assert main(["doctor"]) == plain
        assert main(["doctor", "--strict"]) == strict
    assert "→ make room" in capsys.readouterr().out
    assert main(["doctor", "nowhere.toml"]) == 2


def test_this_machine_is_examined_without_an_exception() -> None:
    subjects = {finding.subject for finding in examine(Config())}
    assert subjects >= {"Python", "packages", "GPU", "CPU cores", "disk", "ports", "network", "variables"}


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "NVIDIA H200, 143771, 500, 570.133.20\nNVIDIA H200, [N/A], 12, 570.133.20\n"
    assert parse_gpus(listing) == (H200, Gpu("NVIDIA H200", 0, 12, "570.133.20"))
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert query_gpus()[0] == H200
    program.write_text("#!/bin/sh\nexit 9\n")
    assert query_gpus() == ()


def test_an_environment_holds_versions_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setattr(environment, "query_gpus", lambda: ())
    described = describe_environment()
    assert described.variables["NCCL_DEBUG"] == "WARN"
    assert "WANDB_API_KEY" not in described.variables
    assert "torch" in described.packages
