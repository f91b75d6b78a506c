"""The scripts that ``slime-async launch slurm`` submits: a heterogeneous job for a run, and a job of further actors."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from slime_async.cli.launch_slurm import HET_GROUPS, task_resources
from slime_async.cli.launcher import Role
from slime_async.cli.roles import PROGRAM
from slime_async.config import Config

END_NOTICE_S = 120
"""Before its time limit, a job is told, and requeues itself: a checkpoint's worth of work may be lost, no more"""

RUN_SCRIPT = """\
#!/bin/bash
# Written by slime-async launch slurm. A job that is requeued, by hand, by preemption, by a node's failure or by itself
# before its time limit, goes on with the run in the same directory.
{directives}
set -uo pipefail
cd {here}
{setup}
trap 'echo "time is nearly up: requeueing"; scontrol requeue "$SLURM_JOB_ID"' USR1
{command} &
supervisor=$!
while kill -0 "$supervisor" 2>/dev/null; do
    wait "$supervisor"
    code=$?
done
exit "$code"
"""

ACTORS_SCRIPT = """\
#!/bin/bash
# Written by slime-async launch slurm --join. Actors of their own, which the run's supervisor knows nothing of.
{directives}
set -uo pipefail
cd {here}
{setup}
exec srun --kill-on-bad-exit=0 {resources} {command}
"""


def run_script(config: Config, config_file: Path, directory: Path) -> str:
    """One heterogeneous job: hub, learner, actors."""
    cluster, ranks = config.cluster, config.learner.ranks
    nodes = cluster.learner_nodes(ranks)
    options: dict[Role, tuple[str, ...]] = {
        "hub": ("--nodes=1", *task_resources("hub", cluster), cluster.sbatch_hub),
        "learner": (
            f"--nodes={nodes}",
            *task_resources("learner", cluster, nodes, ranks // nodes),
            cluster.sbatch_learner,
        ),
        "actor": (*task_resources("actor", cluster, config.actor.count), cluster.sbatch_actors),
    }
    common = (f"--job-name={config.run.name}", "--requeue", cluster.sbatch)
    batch = (f"--output={directory / 'logs' / 'slurm-%j.log'}", "--open-mode=append", f"--signal=B:USR1@{END_NOTICE_S}")
    components = [
        _directive(*common, *(batch if role == "hub" else ()), *options[role])
        for role in sorted(options, key=HET_GROUPS.__getitem__)
    ]
    command = (*PROGRAM, "train", str(config_file), "--launcher", "slurm", "--run-directory", str(directory))
    return RUN_SCRIPT.format(
        directives="\n#SBATCH hetjob\n".join(components),
        here=shlex.quote(str(Path.cwd())),
        setup=cluster.setup,
        command=shlex.join((sys.executable, *command)),
    )


def actors_script(config: Config, directory: Path, actors: int) -> str:
    """A job of actors that join the run in ``directory``; each gets the scheduler's notice before it is preempted."""
    cluster = config.cluster
    resources = task_resources("actor", cluster, actors)
    notice = f"--signal=USR1@{round(config.actor.drain_timeout_s) + 10}"
    common = (f"--job-name={config.run.name}-actors", "--requeue", "--open-mode=append", notice)
    log = f"--output={directory / 'logs' / 'slurm-%j.log'}"
    command = (*PROGRAM, "actor", str(directory / "config.toml"), "--run-directory", str(directory))
    return ACTORS_SCRIPT.format(
        directives=_directive(*common, log, *resources, cluster.sbatch, cluster.sbatch_actors),
        here=shlex.quote(str(Path.cwd())),
        setup=cluster.setup,
        resources=shlex.join(resources),
        command=shlex.join((sys.executable, *command)),
    )


def _directive(*options: str) -> str:
    return "#SBATCH " + " ".join(option for option in options if option)
