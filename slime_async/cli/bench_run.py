"""One mode of the benchmark: an ordinary run, with its processes on given devices, until its time is up."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from slime_async.bench.measure import Measurement, measure
from slime_async.bench.modes import Mode, configure, on_gpus
from slime_async.cli.launch_local import LocalLauncher, LocalProcess
from slime_async.cli.launcher import RoleCommand, place_of, torchrun
from slime_async.cli.roles import plan_run
from slime_async.cli.run_directory import JOURNAL, make_run_directory, owned, write_config
from slime_async.cli.supervise import RunError, RunPlan, Supervisor
from slime_async.config import Config, ConfigError
from slime_async.config.checks import SGLANG_KEYS
from slime_async.protocol import Scalar
from slime_async.queue.events import Accepted, Leased
from slime_async.report.run import read_run
from slime_async.telemetry.environment import write_environment
from slime_async.telemetry.events import EventLog, EventName
from slime_async.telemetry.summary import write_summary

END_S = 120.0
"""Beyond the time of the windows: to start everything, to end the last batch, and to leave"""


def core_of(device: int) -> int:
    """The CPU core that stands for a device. Raises ``ConfigError`` when there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    if device >= len(cores):
        raise ConfigError(
            f"bench.devices needs core {device}, but this machine lends {len(cores)}: lower bench.devices"
        )
    return cores[device]


class DeviceLauncher(LocalLauncher):
    """Keeps roles to their devices: to the GPUs that they see, or to CPU cores."""

    def __init__(self, logs: Path, config: Config, devices_of: Callable[[RoleCommand], Sequence[int] | None]) -> None:
        """``devices_of`` gives a role's devices, or None for one that may run anywhere."""
        super().__init__(logs)
        self._on_gpus = on_gpus(config)
        self._devices_of = devices_of

    async def start(self, command: RoleCommand) -> LocalProcess:
        devices = self._devices_of(command)
        if devices is None:
            return await super().start(command)
        if self._on_gpus:
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
            return await super().start(replace(command, environment={**command.environment, **visible}))
        taskset = shutil.which("taskset")
        if taskset is None:
            raise ConfigError(
                "slime-async bench keeps each process to its CPU cores with taskset (util-linux): install it"
            )
        cores = ",".join(str(core_of(device)) for device in devices)
        python = (sys.executable, *torchrun(command.ranks), *command.arguments)
        return await self.run(command, (taskset, "--cpu-list", cores, *python))


def plan_mode(config: Config, run: Path, mode: Mode, urls: Mapping[int, str]) -> RunPlan:
    """The commands of one mode; ``urls`` are SGLang servers by their first device, which outlive the run."""
    plan = plan_run(config, run)

    def actor(address: str, name: str) -> RoleCommand:
        command = plan.actor(address, name)
        if not urls:
            return command
        own = ("--actor.count", "1", "--actor.engine-urls", f'["{urls[_actor_device(mode, name)]}"]')
        return replace(command, arguments=(*command.arguments, *own))

    return replace(plan, actor=actor)


def devices_of(mode: Mode, urls: Mapping[int, str], command: RoleCommand) -> Sequence[int] | None:
    """The devices that a role of this mode computes on itself; the hub and actors of servers do not."""
    if command.role == "learner":
        return mode.learner_devices
    if command.role == "actor" and not urls:
        return [_actor_device(mode, command.name)]
    return None


def _actor_device(mode: Mode, name: str) -> int:
    return mode.actor_devices[int(place_of(name).removeprefix("actor-"))]


def of_running_servers(config: Config) -> Config:
    """For a run whose servers are there already: it is refused settings that it cannot give them."""
    return config.model_copy(update={"sglang": {k: v for k, v in config.sglang.items() if k in SGLANG_KEYS}})


async def run_mode(config: Config, mode: Mode, directory: Path, urls: Mapping[int, str]) -> Measurement:
    """Run a mode and measure it. Raises ``RunError`` when it fails."""
    bench = config.bench
    own = configure(config, mode, directory, bench.warmup_s + bench.windows * bench.window_s)
    if urls:
        own = of_running_servers(own)
    run = make_run_directory(own, datetime.now())
    with owned(run):
        write_config(own, run)
        write_environment(run)
        launcher = DeviceLauncher(run / "logs", own, partial(devices_of, mode, urls))
        await _supervise(own, run, plan_mode(own, run, mode, urls), launcher)
    return measure(read_run(run), mode, bench, lengths_by_version(run))


async def _supervise(config: Config, run: Path, plan: RunPlan, launcher: LocalLauncher) -> None:
    events = EventLog(run / "events.jsonl")
    events.write("run_started", staleness_bound=config.staleness.max_staleness)
    supervisor = Supervisor(launcher, plan, partial(_record, events))
    outcome, reason = "failed", ""
    limit_s = (config.run.time_limit_s or 0) + END_S
    try:
        async with asyncio.timeout(limit_s):
            await supervisor.start()
            await supervisor.wait()
        outcome = "finished"
    except TimeoutError:
        reason = f"the run did not end within {limit_s:.0f} s"
        raise RunError(f"{reason}; its logs are in {run / 'logs'}") from None
    except RunError as failure:
        reason = str(failure)
        raise
    finally:
        await supervisor.stop()
        events.write("run_finished", outcome=outcome, reason=reason)
        events.close()
        write_summary(run)


def _record(events: EventLog, event: EventName, fields: Mapping[str, Scalar]) -> None:
    events.write(event, **fields)


def lengths_by_version(run: Path) -> dict[int, list[int]]:
    """Sampled tokens of every trajectory by the version that it trained, from the journal."""
    from slime_async.transport.journal import read_trail

    by_group: dict[int, list[int]] = {}
    by_version: dict[int, list[int]] = {}
    if not (run / JOURNAL).is_dir():
        raise ConfigError("slime-async bench reads lengths from the journal: leave hub.journal = true")
    for event in read_trail(run / JOURNAL):
        if isinstance(event, Accepted):
            by_group.setdefault(event.meta.key.task, []).append(event.meta.num_sampled)
        elif isinstance(event, Leased):
            by_version[event.train_version] = [n for group in event.groups for n in by_group.get(group, ())]
    return by_version


def delete_weights(run: Path) -> None:
    """The last checkpoint of a benchmark is nobody's."""
    with suppress(FileNotFoundError):
        shutil.rmtree(run / "checkpoints" / "final")
