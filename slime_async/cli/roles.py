"""The command line and environment of each role, as a launcher starts them."""

from __future__ import annotations

import sys
from pathlib import Path

from slime_async.cli.launch import RoleCommand
from slime_async.cli.supervise import RunPlan
from slime_async.config import Config

PROGRAM = ("-m", "slime_async.cli.main")


def plan_run(config: Config, run: Path) -> RunPlan:
    """All commands of a run on this machine; ``run`` holds the resolved ``config.toml``."""
    settings = (str(run / "config.toml"), "--run-directory", str(run))
    ready = run / "hub.address"

    def hub(address: str, name: str) -> RoleCommand:
        argv = (sys.executable, *PROGRAM, "hub", *settings, "--ready-file", str(ready))
        where_it_was = ("--hub.address", address) if address else ()
        return RoleCommand(name, (*argv, *where_it_was), thread_environment(1))

    def actor(address: str, name: str) -> RoleCommand:
        devices = ("--actor.devices", str(list(actor_devices(config, name)))) if config.actor.devices else ()
        argv = (sys.executable, *PROGRAM, "actor", *settings, "--hub", address, "--name", name, *devices)
        return RoleCommand(name, argv, thread_environment(config.actor.threads))

    def learner(address: str, name: str) -> RoleCommand:
        argv = (*learner_interpreter(config.learner.ranks), *PROGRAM, "learner", *settings, "--hub", address)
        # SGLang turns cuMem off in its processes, and a broadcast needs the same on both sides
        environment = {**thread_environment(config.learner.threads), "NCCL_CUMEM_ENABLE": "0"}
        if config.run.deterministic:  # what torch asks for before cuBLAS is
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        return RoleCommand(name, argv, environment)

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


def learner_interpreter(ranks: int) -> tuple[str, ...]:
    """Plain Python for one rank, torchrun for more; the rendezvous takes a free port."""
    if ranks == 1:
        return (sys.executable,)
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def thread_environment(threads: int) -> dict[str, str]:
    """Limits the thread pools of torch, MKL and OpenBLAS, which otherwise take every core in every process."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
