"""Runs the doctor on every node of a cluster: as a step of a Slurm job, or a task on each node of Ray."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slime_async.cli.roles import PROGRAM
from slime_async.config import ConfigError

Start = Callable[[str], Any]
"""Given the collector's address, starts a report on every node; may give an awaitable"""


def on_slurm(config: Path | None) -> tuple[int, Start]:
    """(nodes, start) of the job that this runs in, all its components."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("--launcher slurm: this is no Slurm job; run it within one: salloc -N 4 slime-async doctor …")
    components = int(os.environ.get("SLURM_HET_SIZE", "1"))
    sizes = [os.environ.get(f"SLURM_JOB_NUM_NODES_HET_GROUP_{index}") for index in range(components)]
    nodes = sum(int(size) for size in sizes if size) or int(os.environ["SLURM_JOB_NUM_NODES"])

    async def start(address: str) -> None:
        groups = (f"--het-group=0-{components - 1}",) if components > 1 else ()
        step = ("srun", *groups, "--ntasks-per-node=1", "--overlap", "--input=none", *_report(config, address))
        await asyncio.create_subprocess_exec(*step)

    return nodes, start


def on_ray(config: Path | None) -> tuple[int, Start]:
    """(nodes, start) of the cluster that RAY_ADDRESS names."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--launcher ray, but ray is not installed: pip install 'slime-async[ray]'")
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True)
    except ConnectionError as error:
        raise ConfigError(f"--launcher ray: no Ray cluster ({error}): ray start --head begins one") from error
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]

    def here(argv: tuple[str, ...], directory: str) -> int:
        where = directory if Path(directory).is_dir() else None
        return subprocess.run((sys.executable, *argv), cwd=where, check=False).returncode

    def start(address: str) -> None:
        for node in alive:
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(here).options(num_cpus=0, scheduling_strategy=on_node)
            task.remote(_report(config, address)[1:], str(Path.cwd()))

    return len(alive), start


def _report(config: Path | None, address: str) -> tuple[str, ...]:
    file = () if config is None else (str(config.resolve()),)
    return (sys.executable, *PROGRAM, "doctor", *file, "--report-to", address)
