"""Roles below Ray actors: Ray decides on which machine, and gives a lost one's roles another; the supervisor when.

::

    supervisor ── hub                                  a process beside us, where the driver runs
               ── place actor-0   ┐ a placement group of its own: CPUs, GPUs of a kind
                    RoleRunner    │ a Ray actor in it, which Ray starts again when its machine is lost
                      subprocess  ┘ the role, life after life
               ── place learner     the same, with a bundle and a runner for each machine

What a role needs beyond its command goes with the call: keys as an object of Ray's store, which the runner writes to a
directory that only it can read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime_async.cli.launch_local import KILL_WAIT_S, TERM_GRACE_S, LocalLauncher, LocalProcess
from slime_async.cli.launcher import RoleCommand
from slime_async.cli.ray_runner import RoleRunner
from slime_async.config import ClusterConfig, Config, ConfigError
from slime_async.transport.security import client_files

log = logging.getLogger(__name__)

FORWARDED = ("NCCL_", "GLOO_", "UCX_", "TORCH_NCCL_", "SGLANG_", "PYTHONPATH")
"""Beginnings of variables that roles on other machines must have as the driver has them"""
PLACEMENT_NOTICE_S = 30.0
"""After so long without a place for a role, the log says what is waited for"""
RETRY_S = 0.5
"""Between questions whether Ray has started a runner again"""
STOP_TIMEOUT_S = TERM_GRACE_S + KILL_WAIT_S + 1.0

Bundle = dict[str, float]


class RayLauncher:
    """Starts roles on a Ray cluster, which this process is a driver of."""

    def __init__(self, config: Config, log_directory: Path) -> None:
        self._config = config
        self._log_directory = log_directory
        self._local = LocalLauncher(log_directory)
        self._keys = None if config.hub.keys is None else ray.put(client_files(config.hub.keys, config.hub.key))
        self._places: dict[str, _Place] = {}
        self._processes: list[RayProcess] = []

    @classmethod
    def connect(cls, config: Config, log_directory: Path) -> RayLauncher:
        """Raises ``ConfigError`` when there is no cluster to connect to."""
        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise ConfigError(
                f"--launcher ray: no Ray cluster at {address!r} ({error}): begin one with ray start --head, or submit "
                "with ray job submit -- slime-async train …"
            ) from error
        return cls(config, log_directory)

    async def start(self, command: RoleCommand) -> LocalProcess | RayProcess:
        """Returns at once: a role whose place is not free yet waits for it."""
        if command.role == "hub":
            return await self._local.start(command)
        place = self._places.get(command.place)
        if place is None:
            bundles = bundles_of(command, self._config.cluster)
            place = self._places[command.place] = _Place(command.place, bundles, str(self._log_directory))
        command = replace(command, environment={**forwarded(os.environ), **command.environment})
        process = RayProcess(command, place, self._keys, self._config.cluster, self._log_directory, self._give_back)
        self._processes.append(process)
        return process

    async def _give_back(self, place: str) -> None:
        """Who was in this place has left it for good: others may have its machine."""
        await self._places.pop(place).stop()

    async def stop(self) -> None:
        """Roles first, then their places; Ray kills what does not answer."""
        stopping = [place.stop() for place in self._places.values()]
        await asyncio.gather(*stopping, self._local.stop())
        for process in self._processes:
            process.cancel()
        ray.shutdown()


class RayProcess:
    """One life of a role, on one machine or (a learner) on several."""

    def __init__(
        self,
        command: RoleCommand,
        place: _Place,
        keys: Any,
        cluster: ClusterConfig,
        log_directory: Path,
        give_back: Callable[[str], Awaitable[None]],
    ) -> None:
        self._give_back = give_back
        self._leaves = False
        self.name = command.name
        self.log = log_directory / f"{command.name}.log"
        self._place = place
        self._run = asyncio.create_task(self._live(command, keys, cluster), name=f"ray {command.name}")

    async def wait(self) -> int:
        return await asyncio.shield(self._run)

    async def leave(self) -> None:
        self._leaves = True
        await self._place.tell("leave")

    def cancel(self) -> None:
        self._run.cancel()

    async def _live(self, command: RoleCommand, keys: Any, cluster: ClusterConfig) -> int:
        """One life, after which a place that it was to leave is free again."""
        code = await self._exit_code(command, keys, cluster)
        if self._leaves:
            await self._give_back(self._place.name)
        return code

    async def _exit_code(self, command: RoleCommand, keys: Any, cluster: ClusterConfig) -> int:
        """A machine that is lost counts as SIGKILL."""
        try:
            runners = await self._place.runners(cluster)
            meeting = await self._meeting(runners, command.ranks // len(runners), cluster)
            running = {
                asyncio.ensure_future(runner.run.remote(command, (*meeting, *_node_rank(rank, runners)), keys))
                for rank, runner in enumerate(runners)
            }
            while running:  # one that fails takes the others with it
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                codes = [task.result() for task in done]
                if failed := [code for code in codes if code]:
                    await self._place.tell("stop")
                    return int(failed[0])
        except RayError as error:
            log.warning("%s is lost: %s", command.name, str(error).splitlines()[0])
            await self._place.tell("stop")
            return -signal.SIGKILL
        else:
            return 0

    async def _meeting(self, runners: list[Any], per_node: int, cluster: ClusterConfig) -> tuple[str, ...]:
        """torchrun's options on each of several machines; none on one."""
        if len(runners) == 1:
            return ()
        first = await runners[0].address.remote()
        port = str(cluster.rendezvous_port)
        options = ("--nnodes", str(len(runners)), "--master-addr", str(first), "--master-port", port)
        return (*options, "--nproc-per-node", str(per_node))


@dataclass(slots=True)
class _Place:
    """Where a role lives: its reservation of machines, and the runners in it, which outlive the role's lives."""

    name: str
    bundles: list[Bundle]
    log_directory: str
    group: PlacementGroup | None = None
    handles: list[Any] | None = None

    async def runners(self, cluster: ClusterConfig) -> list[Any]:
        """Once all of them answer: for the first time, or again on another machine."""
        if self.group is None:
            strategy = "STRICT_SPREAD" if len(self.bundles) > 1 else "PACK"
            self.group = placement_group([dict(bundle) for bundle in self.bundles], strategy, name=self.name)
        await _noticed(self.group.ready(), f"{self.name} waits for {self.bundles} on {len(self.bundles)} machines")
        if self.handles is None:
            self.handles = [self._runner(self.group, index) for index in range(len(self.bundles))]
        for index, runner in enumerate(self.handles):
            await _noticed(self._answer(index, runner), f"{self.name} waits for its machine {index}")
        return self.handles

    def _runner(self, group: PlacementGroup, index: int) -> Any:
        bundle = self.bundles[index]
        return (
            ray.remote(RoleRunner)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                max_restarts=-1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            .remote(self.log_directory, str(Path.cwd()))
        )

    async def _answer(self, index: int, runner: Any) -> None:
        """Until the runner answers; Ray starts it again after the loss of its machine, which takes a while."""
        assert self.group is not None
        assert self.handles is not None
        while True:
            try:
                await runner.address.remote()
                return
            except ActorUnavailableError:
                await asyncio.sleep(RETRY_S)
            except ActorDiedError:
                runner = self.handles[index] = self._runner(self.group, index)
                await asyncio.sleep(RETRY_S)

    async def tell(self, what: str) -> None:
        """``leave`` or ``stop`` to all runners that are there."""
        answers = [getattr(runner, what).remote() for runner in self.handles or ()]
        results = await asyncio.gather(*answers, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, RayError):
                raise result

    async def stop(self) -> None:
        try:
            await asyncio.wait_for(self.tell("stop"), STOP_TIMEOUT_S)
        except TimeoutError:
            log.warning("%s did not stop in time: Ray kills it", self.name)
        for runner in self.handles or ():
            ray.kill(runner)
        if self.group is not None:
            remove_placement_group(self.group)


def bundles_of(command: RoleCommand, cluster: ClusterConfig) -> list[Bundle]:
    """What a role reserves: one bundle per machine."""
    if command.role == "actor":
        return [_bundle(cluster.actor_cpus, cluster.actor_gpus, cluster.actor_gpu_kind)]
    nodes = cluster.learner_nodes(command.ranks)
    ranks = command.ranks // nodes
    return [_bundle(cluster.learner_cpus * ranks, cluster.learner_gpus * ranks, cluster.learner_gpu_kind)] * nodes


def _bundle(cpus: int, gpus: int, kind: str) -> Bundle:
    """Ray marks machines with a resource for the kind of their GPUs, of which a thousandth is enough."""
    of_kind = {f"accelerator_type:{kind}": 0.001} if kind else {}
    return {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {}), **of_kind}


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """What must be the same on all machines."""
    return {name: value for name, value in environment.items() if name.startswith(FORWARDED)}


def _node_rank(rank: int, runners: list[Any]) -> tuple[str, ...]:
    return ("--node-rank", str(rank)) if len(runners) > 1 else ()


async def _noticed(answer: Any, what: str) -> None:
    """Wait, however long it takes, and say so when it takes long."""
    waiting = asyncio.ensure_future(answer)
    while not (await asyncio.wait({waiting}, timeout=PLACEMENT_NOTICE_S))[0]:
        log.warning("%s: nothing free since %.0f s", what, PLACEMENT_NOTICE_S)
    waiting.result()
