"""``slime-async bench``: synchronous against asynchronous training, on the same devices, in one run.

Each mode of ``bench.modes`` is an ordinary run of the same configuration; what differs between them is listed, checked
and printed. Writes ``bench.json`` and ``bench.html`` beside the modes' run directories, and prints a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from slime_async.bench.compare import Comparison, compare, table
from slime_async.bench.contract import SPEED_TOLERANCE, Clause, check_after, check_before, relative_speeds
from slime_async.bench.measure import Measurement
from slime_async.bench.modes import Mode, configure, modes_of, on_gpus
from slime_async.bench.page import write_page
from slime_async.bench.saturated import EngineRate, SaturatedEngine, SaturatedLearner, SideBySide, rate_between
from slime_async.bench.speed import CoreSpeeds
from slime_async.cli.bench_run import DeviceLauncher, core_of, run_mode
from slime_async.cli.common import add_config_argument, config_of
from slime_async.cli.launcher import RoleCommand
from slime_async.cli.prepare import prepare_model
from slime_async.cli.roles import plan_run, thread_environment
from slime_async.cli.run_directory import make_run_directory, write_config
from slime_async.cli.saturate import LEARNER_BATCHES, LEARNER_READY, LEARNER_STOP, START
from slime_async.cli.supervise import RunError
from slime_async.cli.train import check_modules
from slime_async.config import Config
from slime_async.config.dump import dump_toml
from slime_async.report.run import flatten
from slime_async.telemetry.environment import Environment, describe_environment

if TYPE_CHECKING:
    from slime_async.cli.bench_servers import Servers

SIDE_TIMEOUT_S = 600.0
"""For one side alone: start, warm-up and measurement"""
POLL_S = 0.05
UNBOUNDED = 1_000_000
"""An η that no measurement reaches"""
LOCAL_KEYS = ("run.directory", "model.path")
"""Of the configuration, what means nothing elsewhere"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="where to; modes that were measured there before are taken over [run.directory/bench-NAME-TIME]",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="a second copy of bench.json")


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    check_modules(config)
    modes = modes_of(config)
    stamp = f"bench-{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    directory: Path = (parsed.output or config.run.directory / stamp).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        outputs = [directory / "bench.json", *([parsed.json] if parsed.json else [])]
        fair = asyncio.run(Bench(config, modes, directory, outputs).run())
    except RunError as failure:
        print(f"slime-async: {failure}", file=sys.stderr, flush=True)
        return failure.exit_code
    return 0 if fair else 1


class Bench:
    """One benchmark: the model, each side alone, then mode after mode."""

    def __init__(self, config: Config, modes: Sequence[Mode], directory: Path, outputs: Sequence[Path]) -> None:
        self._config = config
        self._modes = modes
        self._directory = directory
        self._outputs = outputs
        self._environment = describe_environment()
        self._began = time.monotonic()
        self._servers: Servers | None = None

    async def run(self) -> bool:
        """Whether the contract holds. What is known is written after every mode. Raises ``RunError``."""
        self._config = config = await self._prepared()
        before = check_before(self._modes, self._flat_configs(), Path(config.model.path))
        for clause in before:
            self._say(str(clause))
        self._servers = await self._started_servers()
        try:
            engine = await self._saturated_engine()
            delivering = await self._delivering_engine()
            separate = {len(mode.learner_devices) for mode in self._modes if not mode.colocated}
            sizes = sorted(separate or {len(mode.learner_devices) for mode in self._modes})
            learners: dict[int, SaturatedLearner] = {}
            beside: dict[int, SideBySide] = {}
            for size in sizes:
                learners[size], both = await self._saturated_learner(size, beside=bool(separate))
                if both is not None:
                    beside[size] = both
            together = await self._engines_together()
            measurements: list[Measurement] = []
            async for measurements, failed in self._measurements():
                if measurements:
                    clauses = [*before, *check_after(measurements, failed)]
                    comparison = compare(self._modes, measurements, engine, learners, delivering, beside, together)
                    self._write(comparison, clauses)
        finally:
            if self._servers is not None:
                await self._servers.close()
        if not measurements:
            raise RunError("no mode could be measured")
        self._print(comparison, clauses)
        return all(clause.holds for clause in clauses)

    async def _started_servers(self) -> Servers | None:
        """Those of SGLang, which every mode uses; embedded engines live in their actors."""
        if self._config.actor.engine != "sglang":
            return None
        from slime_async.actors.engine import EngineError
        from slime_async.cli.bench_servers import start_servers

        try:
            servers = await start_servers(self._config, self._modes, self._directory / "logs")
        except EngineError as error:
            raise RunError(str(error)) from error
        self._say(servers.identity)
        return servers

    async def _prepared(self) -> Config:
        """The configuration with a checkpoint that every mode begins from."""
        config = prepare_model(self._config, self._directory)
        if config.warm_start.steps:
            if not (self._directory / START).is_dir():
                self._say(f"supervised phase of {config.warm_start.steps} steps, once for all modes")
                everywhere = range(config.bench.devices)
                await self._side("warm-start", config, everywhere, threads=config.warm_start.threads)
            config = _with_model(config, self._directory / START)
        return config

    def _flat_configs(self) -> dict[str, dict[str, Any]]:
        return {mode.name: flatten(self._of(mode).model_dump(mode="json")) for mode in self._modes}

    def _of(self, mode: Mode) -> Config:
        bench = self._config.bench
        return configure(self._config, mode, self._directory, bench.warmup_s + bench.windows * bench.window_s)

    async def _quiet_servers(self) -> Servers | None:
        """Without any request or cached prefix; those that do not become quiet are started anew."""
        if self._servers is None:
            return None
        from slime_async.actors.engine import EngineError

        try:
            await self._servers.quieten()
        except EngineError as error:
            self._say(f"the servers do not become quiet, others take their place: {error}")
            await self._servers.close()
            self._servers = await self._started_servers()
        return self._servers

    async def _saturated_engine(self) -> SaturatedEngine:
        path = self._directory / "saturated-engine.json"
        if not path.exists():
            device = self._last_engine()
            await self._side("engine", self._config, [device], *self._url(device))
        engine = SaturatedEngine.from_plain(json.loads(path.read_text()))
        rates = ", ".join(f"{rate.tokens_per_s:,.0f} with {rate.running:.0f}" for rate in engine.rates)
        self._say(f"an engine alone, tokens/s: {rates} requests")
        return engine

    async def _saturated_learner(self, devices: int, *, beside: bool) -> tuple[SaturatedLearner, SideBySide | None]:
        """Alone, and with ``beside`` then beside an engine, both saturated."""
        kept, both = (self._directory / f"{name}-{devices}.json" for name in ("saturated-learner", "side-by-side"))
        if not kept.exists() or (beside and not both.exists()):
            for leftover in (LEARNER_READY, LEARNER_STOP):
                (self._directory / leftover).unlink(missing_ok=True)
            more = ("--beside",) if beside else ()
            training = asyncio.create_task(self._side("learner", self._config, range(devices), *more, ranks=devices))
            try:
                if beside:
                    await self._until(self._directory / LEARNER_READY, training)
                    with CoreSpeeds(self._cores(range(devices)).values()) as speeds:
                        [full] = await self._full_engines([self._last_engine()], f"beside-{devices}")
                    (self._directory / LEARNER_STOP).touch()
                await training
            finally:
                training.cancel()
            (self._directory / "saturated-learner.json").rename(kept)
            if beside:
                batches = json.loads((self._directory / LEARNER_BATCHES).read_text())
                began_s, ended_s = full["began_s"], full["ended_s"]
                learner_rate, learner_speed = rate_between(batches, began_s, ended_s), speeds.between(began_s, ended_s)
                rates = SideBySide(full["tokens_per_s"], learner_rate, full["speed"], learner_speed)
                both.write_text(json.dumps(rates.to_plain()))
        learner = SaturatedLearner.from_plain(json.loads(kept.read_text()))
        self._say(f"a learner on {devices} devices, fed from memory: {learner.tokens_per_s:,.0f} tokens/s")
        if not beside:
            return learner, None
        rates = SideBySide(**json.loads(both.read_text()))
        engine, trained = rates.engine_tokens_per_s, rates.learner_tokens_per_s
        self._say(f"side by side, tokens/s: an engine {engine:,.0f}, a learner {trained:,.0f}")
        return learner, rates

    async def _delivering_engine(self) -> EngineRate:
        rate = await self._full_rate([self._last_engine()], "delivering", "delivering-engine.json")
        self._say(f"an engine whose actor delivers to a hub, tokens/s: {rate.tokens_per_s:,.0f}")
        return rate

    async def _engines_together(self) -> EngineRate | None:
        """One engine while those of the colocated mode are all full; None without that mode."""
        devices = next((mode.actor_devices for mode in self._modes if mode.colocated), ())
        if not devices:
            return None
        rate = await self._full_rate(devices, "together", "engines-together.json")
        self._say(f"{len(devices)} such engines at once, tokens/s: {rate.tokens_per_s:,.0f} each")
        return rate

    async def _full_rate(self, devices: Sequence[int], name: str, file: str) -> EngineRate:
        """The mean of full engines on these devices, kept in ``file``."""
        path = self._directory / file
        if not path.exists():
            fulls = await self._full_engines(devices, name)
            means = {key: mean(full[key] for full in fulls) for key in ("running", "tokens_per_s", "speed")}
            path.write_text(json.dumps(means))
        return EngineRate(**json.loads(path.read_text()))

    async def _full_engines(self, devices: Sequence[int], name: str) -> list[dict[str, float]]:
        """One full engine on each of the devices at the same time, in actors of a hub of their own."""
        files = [self._directory / f"{name}-{device}.json" for device in devices]
        for file in files:
            file.unlink(missing_ok=True)
        async with self._open_hub(name) as address:
            sides = []
            for i, device in enumerate(devices):
                together = map(str, files[i:] + files[:i])
                more = (*self._url(device), "--hub", address, "--together", *together)
                sides.append(self._side("full-engine", self._config, [device], *more, name=files[i].stem))
            await asyncio.gather(*sides)
        return [json.loads(file.read_text()) for file in files]

    @asynccontextmanager
    async def _open_hub(self, name: str) -> AsyncIterator[str]:
        """A hub that always grants, since nobody leases from it what it gets; its address."""
        staleness = self._config.staleness.model_copy(update={"max_staleness": UNBOUNDED})
        run = self._config.run.model_copy(update={"name": name, "directory": self._directory})
        config = self._config.model_copy(update={"staleness": staleness, "run": run})
        directory = make_run_directory(config, datetime.now())
        write_config(config, directory)
        launcher, plan = DeviceLauncher(directory / "logs", config, lambda _: None), plan_run(config, directory)
        hub = await launcher.start(plan.hub("", "hub"))
        try:
            await self._until(plan.ready_file, asyncio.create_task(hub.wait()))
            address, published = plan.ready_file.read_text().strip(), directory / "published"
            arguments = ("-m", "slime_async.cli.saturate", "nobody", str(directory / "config.toml"), str(directory))
            learner = await launcher.start(RoleCommand("nobody", (*arguments, "--hub", address), thread_environment(1)))
            await self._until(published, asyncio.create_task(learner.wait()))
            yield address
        finally:
            await launcher.stop()

    def _cores(self, devices: Iterable[int]) -> dict[int, int]:
        """The cores that these devices are; none where they are GPUs."""
        return {} if on_gpus(self._config) else {device: core_of(device) for device in devices}

    def _last_engine(self) -> int:
        """Its device, on which no learner is where sides are separate."""
        return max(device for mode in self._modes for device in mode.actor_devices)

    def _url(self, device: int) -> tuple[str, ...]:
        return ("--url", self._servers.urls[device]) if self._servers is not None else ()

    async def _until(self, file: Path, working: asyncio.Task[Any]) -> None:
        """Until ``working`` has made the file; raises what it raised, and ``RunError`` when it ended without."""
        while not file.exists():
            done, _ = await asyncio.wait({working}, timeout=POLL_S)
            if done:
                await working
                raise RunError(f"a process ended before it made {file}: see the logs in {self._directory}")

    async def _side(
        self,
        side: str,
        config: Config,
        devices: Sequence[int],
        *more: str,
        ranks: int = 1,
        threads: int = 1,
        name: str = "",
    ) -> None:
        """One side alone, in processes of its own. Raises ``RunError``."""
        learner = config.learner.model_copy(update={"ranks": ranks, "threads": threads})
        run = config.run.model_copy(update={"steps": 10**6})
        name = name or f"{side}-{len(devices)}"
        file = self._directory / f"{name}.toml"
        file.write_text(dump_toml(config.model_copy(update={"learner": learner, "run": run})), encoding="utf-8")
        arguments = ("-m", "slime_async.cli.saturate", side, str(file), str(self._directory), *more)
        environment = {**thread_environment(threads), "NCCL_CUMEM_ENABLE": "0"}
        launcher = DeviceLauncher(self._directory / "logs", config, lambda _: devices)
        process = await launcher.start(RoleCommand(name, arguments, environment, ranks))
        try:
            async with asyncio.timeout(SIDE_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            raise RunError(f"{name} took longer than {SIDE_TIMEOUT_S:.0f} s; its log is {process.log}") from None
        finally:
            await launcher.stop()
        if code:
            raise RunError(f"{name} alone failed with exit code {code}; its log is {process.log}")

    async def _measurements(self) -> AsyncIterator[tuple[list[Measurement], list[str]]]:
        """Mode after mode: what is measured so far, and the names of those that failed.

        A mode whose cores were unusually fast or slow is measured once more; of the two counts the one in which they
        were more usual.
        """
        known: dict[str, Measurement] = {}
        failed: list[str] = []
        for mode in self._modes:
            try:
                known[mode.name] = await self._measured(mode)
            except (RunError, ValueError) as problem:  # the others are worth having all the same
                failed.append(mode.name)
                self._say(f"{mode.name} FAILED: {problem}")
            yield list(known.values()), failed
        for mode in self._modes:
            speed = relative_speeds(list(known.values())).get(mode.name, 1.0)
            if abs(speed - 1) <= SPEED_TOLERANCE:
                continue
            self._say(f"{mode.name}: its cores were {speed:.2f} times as fast as usual, so once more")
            try:
                again = await self._measure(mode)
            except (RunError, ValueError) as problem:
                self._say(f"{mode.name} FAILED, the measurement before stays: {problem}")
                continue
            if abs(relative_speeds(list((known | {mode.name: again}).values()))[mode.name] - 1) < abs(speed - 1):
                known[mode.name] = again
                self._keep(again)
            yield list(known.values()), failed

    async def _measured(self, mode: Mode) -> Measurement:
        path = self._file_of(mode.name)
        if path.exists():
            self._say(f"{mode.name}: measured before")
            return Measurement.from_plain(json.loads(path.read_text()))
        measurement = await self._measure(mode)
        self._keep(measurement)
        return measurement

    async def _measure(self, mode: Mode) -> Measurement:
        servers = await self._quiet_servers()
        urls, identity = (servers.urls, servers.identity) if servers is not None else ({}, "")
        cores = self._cores(mode.devices)
        with CoreSpeeds(cores.values()) as watched:
            measurement = await run_mode(self._config, mode, self._directory, urls)
        began_s, ended_s = measurement.windows[0].start_s, measurement.windows[-1].end_s
        by_device = {str(device): watched.between(began_s, ended_s, [core]) for device, core in cores.items()}
        measurement = replace(measurement, servers=identity, core_speeds=by_device)
        speeds = ", ".join(f"{speed:.2f}" for speed in measurement.samples_per_s)
        self._say(f"{mode.name}: {speeds} samples/s")
        return measurement

    def _keep(self, measurement: Measurement) -> None:
        self._file_of(measurement.mode).write_text(json.dumps(measurement.to_plain()), encoding="utf-8")

    def _file_of(self, mode: str) -> Path:
        return self._directory / f"{mode.replace(' ', '-').replace(':', '-')}.json"

    def _write(self, comparison: Comparison, clauses: Sequence[Clause]) -> None:
        title = f"{self._config.run.name}: sync against async"
        hardware = hardware_of(self._environment, self._config)
        write_page(comparison, clauses, title, hardware, self._directory / "bench.html")
        text = json.dumps(self._result(comparison, clauses), indent=1) + "\n"
        for path in self._outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def _print(self, comparison: Comparison, clauses: Sequence[Clause]) -> None:
        print(f"\n{hardware_of(self._environment, self._config)}\n")
        for clause in clauses:
            print(clause)
        print(f"\n{table(comparison, self._config.bench.target_accuracy)}\n")
        for name, value in comparison.figures().items():
            print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
        print(*self._outputs, self._directory / "bench.html", sep="\n", flush=True)

    def _result(self, comparison: Comparison, clauses: Sequence[Clause]) -> dict[str, Any]:
        environment = self._environment
        return {
            "command": " ".join(["slime-async", *sys.argv[1:]]),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": hardware_of(environment, self._config),
            "versions": {"python": environment.python, **environment.packages},
            "seconds": time.monotonic() - self._began,
            "figures": comparison.figures(),
            "contract": [{"text": c.text, "holds": c.holds, "detail": c.detail} for c in clauses],
            "config": {k: v for k, v in flatten(self._config.model_dump(mode="json")).items() if k not in LOCAL_KEYS},
            **comparison.to_plain(),
        }

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)


def _with_model(config: Config, checkpoint: Path) -> Config:
    warm_start = config.warm_start.model_copy(update={"steps": 0, "control_steps": 0})
    model = config.model.model_copy(update={"path": str(checkpoint)})
    return config.model_copy(update={"warm_start": warm_start, "model": model})


def hardware_of(environment: Environment, config: Config) -> str:
    """What every mode had, as anybody would say it."""
    if on_gpus(config) and environment.gpus:
        return f"{config.bench.devices}× {environment.gpus[0].name}, {environment.cpus} CPU cores"
    return f"{config.bench.devices} CPU cores, {platform.machine()}"
