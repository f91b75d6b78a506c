"""The command line and environment of each role, as a launcher starts them."""

from __future__ import annotations

from pathlib import Path

from slime_async.cli.common import HUB_ADDRESS
from slime_async.cli.launcher import RoleCommand
from slime_async.cli.supervise import RunPlan
from slime_async.config import Config

PROGRAM = ("-m", "slime_async.cli.main")


def plan_run(config: Config, run: Path, listen: str = "") -> RunPlan:
    """All commands of a run, whoever launches them; ``run`` holds the resolved ``config.toml``.

    ``listen`` is where the hub's first life listens, if not where the configuration says.
    """
    settings = (str(run / "config.toml"), "--run-directory", str(run))
    ready = run / HUB_ADDRESS

    def hub(address: str, name: str) -> RoleCommand:
        arguments = (*PROGRAM, "hub", *settings, "--ready-file", str(ready))
        where = ("--hub.address", address or listen) if address or listen else ()
        return RoleCommand(name, (*arguments, *where), thread_environment(1))

    def actor(address: str, name: str) -> RoleCommand:
        arguments = (*PROGRAM, "actor", *settings, "--hub", address, "--name", name)
        return RoleCommand(name, arguments, thread_environment(config.actor.threads))

    def learner(address: str, name: str) -> RoleCommand:
        arguments = (*PROGRAM, "learner", *settings, "--hub", address)
        # SGLang turns cuMem off in its processes, and a broadcast needs the same on both sides
        environment = {**thread_environment(config.learner.threads), "NCCL_CUMEM_ENABLE": "0"}
        if config.run.deterministic:  # what torch asks for before cuBLAS is
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        return RoleCommand(name, arguments, environment, config.learner.ranks)

    return RunPlan(
        hub=hub,
        ready_file=ready,
        learner=learner,
        actor=actor,
        actors=config.actor.count,
        max_restarts={
            "hub": config.hub_restarts,
            "learner": config.learner_restarts,
            "actor": config.actor.max_restarts,
        },
    )


def thread_environment(threads: int) -> dict[str, str]:
    """Limits the thread pools of torch, MKL and OpenBLAS, which otherwise take every core in every process."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
