"""What a run ran on: machine, software, and the variables that change how it behaves. ``RUN/environment.json``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from slime_async import __version__

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "sglang",
    "transformers",
    "safetensors",
    "numpy",
    "pyzmq",
    "msgpack",
    "uvloop",
    "pydantic",
    "rich",
    "reasoning-gym",
    "tensorboard",
    "wandb",
    "prometheus-client",
    "ray",
)
"""Whose versions matter when a run is to be repeated"""
VARIABLE_PREFIXES = ("NCCL_", "CUDA_", "GLOO_", "TORCH_", "PYTORCH_", "OMP_", "MKL_", "SGLANG_", "UB_", "NVTE_")
"""Environment variables that are kept; none of these families holds secrets"""
NVIDIA_SMI_TIMEOUT_S = 20.0
"""It answers in a second; a driver in trouble may hang for ever"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of ``nvidia-smi``."""

    name: str
    memory_total_mib: int
    memory_used_mib: int
    driver: str


@dataclass(frozen=True, slots=True)
class Environment:
    """As ``environment.json`` holds it."""

    slime_async: str
    python: str
    platform: str
    host: str
    cpus: int
    """That this process may use"""
    memory_gib: float | None
    gpus: tuple[Gpu, ...]
    packages: dict[str, str]
    variables: dict[str, str]
    command: tuple[str, ...]


def describe_environment() -> Environment:
    """Of this process and machine; takes a second where there are GPUs."""
    return Environment(
        slime_async=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        host=platform.node(),
        cpus=usable_cpus(),
        memory_gib=memory_gib(),
        gpus=query_gpus(),
        packages={name: version for name in PACKAGES if (version := package_version(name)) is not None},
        variables={name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLE_PREFIXES)},
        command=tuple(sys.argv),
    )


def write_environment(run: Path) -> None:
    """Write ``environment.json``."""
    text = json.dumps(asdict(describe_environment()), indent=2, ensure_ascii=False)
    (run / "environment.json").write_text(text + "\n", encoding="utf-8")


def package_version(name: str) -> str | None:
    """None when it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """Cores that this process may run on; containers often get fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Of the machine, or of the container where that is less; None where it cannot be told."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such controller, or "max"
            continue
    return min(limits) / 2**30 if limits else None


def query_gpus() -> tuple[Gpu, ...]:
    """What ``nvidia-smi`` lists; empty without a driver, or when it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = "name,memory.total,memory.used,driver_version"
    argv = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return ()
    return parse_gpus(done.stdout)


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """Lines of ``name, total, used, driver``; memory that a driver does not tell counts as 0."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 3]
    return tuple(Gpu(name, _mib(total), _mib(used), driver) for name, total, used, driver in rows)


def _mib(cell: str) -> int:
    return int(cell) if cell.isdigit() else 0
