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
        devices = ("--actor.devices", str(list(actor_devices(config, name)))) if config.actor.devices else ()
        arguments = (*PROGRAM, "actor", *settings, "--hub", address, "--name", name, *devices)
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


def actor_devices(config: Config, name: str) -> tuple[int, ...]:
    """The share of ``actor.devices`` of the actor called ``actor-1`` or, in a later life, ``actor-1.2``."""
    index = int(name.removeprefix("actor-").partition(".")[0])
    share = len(config.actor.devices) // config.actor.count
    return config.actor.devices[index * share : (index + 1) * share]


def thread_environment(threads: int) -> dict[str, str]:
    """Limits the thread pools of torch, MKL and OpenBLAS, which otherwise take every core in every process."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
