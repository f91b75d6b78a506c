"""Roles as steps of a heterogeneous Slurm job: this runs in the job's batch script, on the hub's node.

::

    component 0   batch script ── supervisor ── hub          a process beside us
    component 1   srun ── torchrun ── ranks of the learner   one task per node
    component 2   srun ── actor                              one step per actor, so that each can be started again

Each ``srun`` is a child of ours, whose exit code is its step's. Slurm ends all of it with the job.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slime_async.cli.launch_local import LocalLauncher, LocalProcess
from slime_async.cli.launcher import Role, RoleCommand, torchrun
from slime_async.config import ClusterConfig, Config, ConfigError

HET_GROUPS: dict[Role, int] = {"hub": 0, "learner": 1, "actor": 2}
SCONTROL_TIMEOUT_S = 30.0
ON_EACH_NODE = 'exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'
"""Which node this is, only the node itself knows"""


@dataclass(frozen=True, slots=True)
class SrunProcess:
    """One step, through its ``srun``."""

    process: LocalProcess

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def log(self) -> Path:
        return self.process.log

    async def wait(self) -> int:
        """srun tells a signal as 128 + its number."""
        code = await self.process.wait()
        return 128 - code if code > 128 else code

    async def leave(self) -> None:
        """srun passes this signal on; at SIGTERM it would end its step at once."""
        self.process.signal(signal.SIGUSR1)


class SlurmLauncher:
    """Starts steps in the components of the job that this process runs in. Raises ``ConfigError`` outside of one."""

    def __init__(self, config: Config, log_directory: Path) -> None:
        if os.environ.get("SLURM_HET_SIZE") != str(len(HET_GROUPS)):
            raise ConfigError(
                "--launcher slurm runs within a heterogeneous job of three components: submit one with "
                "slime-async launch slurm CONFIG"
            )
        self._config = config
        self._local = LocalLauncher(log_directory)

    async def start(self, command: RoleCommand) -> LocalProcess | SrunProcess:
        if command.role == "hub":
            return await self._local.start(command)
        return SrunProcess(await self._local.run(command, step(command, self._config)))

    async def stop(self) -> None:
        await self._local.stop()


def step(command: RoleCommand, config: Config) -> tuple[str, ...]:
    """The ``srun`` that runs a role."""
    cluster = config.cluster
    srun: tuple[str, ...] = (
        "srun",
        f"--het-group={HET_GROUPS[command.role]}",
        f"--job-name={command.name}",
        "--input=none",
        "--kill-on-bad-exit=1",
        "--exact",
    )
    if command.role == "actor":
        return (*srun, "--nodes=1", *task_resources("actor", cluster), sys.executable, *command.arguments)
    nodes = cluster.learner_nodes(command.ranks)
    per_node = command.ranks // nodes
    srun = (*srun, f"--nodes={nodes}", *task_resources("learner", cluster, nodes, per_node))
    if nodes == 1:
        return (*srun, sys.executable, *torchrun(command.ranks), *command.arguments)
    meeting: tuple[str, ...] = ("--nnodes", str(nodes), "--master-addr", first_node(HET_GROUPS["learner"]))
    meeting += ("--master-port", str(cluster.rendezvous_port), "--nproc-per-node", str(per_node))
    return (*srun, "bash", "-c", ON_EACH_NODE, sys.executable, *meeting, *command.arguments)


def task_resources(role: Role, cluster: ClusterConfig, tasks: int = 1, ranks: int = 1) -> tuple[str, ...]:
    """Options of sbatch and srun alike: tasks, and what each gets; ``ranks`` are a learner's in one task."""
    if role == "hub":
        return ("--ntasks=1", f"--cpus-per-task={cluster.hub_cpus}")
    cpus, gpus, kind = cluster.actor_cpus, cluster.actor_gpus, cluster.actor_gpu_kind
    if role == "learner":
        cpus, gpus, kind = cluster.learner_cpus * ranks, cluster.learner_gpus * ranks, cluster.learner_gpu_kind
    of_kind = f"{kind}:{gpus}" if kind else str(gpus)
    spread = ("--ntasks-per-node=1",) if role == "learner" else ()
    return (f"--ntasks={tasks}", *spread, f"--cpus-per-task={cpus}", *((f"--gpus-per-task={of_kind}",) if gpus else ()))


def first_node(het_group: int) -> str:
    """The address of a component's first node, as Slurm itself reaches it."""
    nodes = os.environ[f"SLURM_JOB_NODELIST_HET_GROUP_{het_group}"]
    name = scontrol("show", "hostnames", nodes).split()[0]
    found = re.search(r"\bNodeAddr=(\S+)", scontrol("show", "node", name))
    return found[1] if found else name


def scontrol(*arguments: str) -> str:
    """Raises ``ConfigError`` with what it says when it fails."""
    return slurm_command(("scontrol", *arguments))


def slurm_command(argv: Sequence[str]) -> str:
    """What one of Slurm's commands prints. Raises ``ConfigError`` when it is missing or refuses."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S, check=True)
    except FileNotFoundError:
        raise ConfigError(f"there is no {argv[0]} here: run this where Slurm's commands are installed") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{argv[0]} does not answer within {SCONTROL_TIMEOUT_S:g} s: is slurmctld up?") from None
    except subprocess.CalledProcessError as failed:
        raise ConfigError(f"{' '.join(argv)}: {failed.stderr.strip()}") from None
    return done.stdout
