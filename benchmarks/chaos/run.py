"""One run under fire: the demo with checkpoints, a plan whose roles may be aimed at, and what came of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from benchmarks.chaos.killer import Killer
from benchmarks.chaos.recovery import Death, deaths_of
from slime_async.audit import AuditReport, audit
from slime_async.cli.audit import has_finished
from slime_async.cli.launcher import Role, RoleCommand, role_of
from slime_async.cli.prepare import prepare_model
from slime_async.cli.roles import PROGRAM, plan_run
from slime_async.cli.run_directory import JOURNAL, make_run_directory, write_config
from slime_async.cli.supervise import RunPlan
from slime_async.cli.train import train
from slime_async.config import Config, load_config
from slime_async.telemetry.metrics import read_metrics
from slime_async.telemetry.summary import Summary, summarise
from slime_async.transport.journal import read_trail

DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"
Aims = Mapping[Role, Sequence[tuple[str, int]]]
"""(point, n-th passage) for the first lives of each role; further lives are aimed at by nothing"""
AIMS: Aims = {
    "learner": (("learner_commit", 6), ("learner_broadcast", 5), ("learner_checkpoint", 1)),
    "actor": (("actor_delivery", 300), ("actor_receive", 4)),
    "hub": (("hub_delivery", 60), ("hub_relay", 8)),
}
"""Each point once, early in a life, so that the life gets there before it is killed from outside"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is left of a run under fire."""

    directory: Path
    exit_code: int
    summary: Summary
    deaths: list[Death]
    audit: AuditReport


SEVERAL_BUFFERS = "65536"
"""Bytes of each: a broadcast has a middle"""


def demo_config(settings: Mapping[str, str]) -> Config:
    """The demo's configuration under ``settings``, which are named as flags are."""
    overrides = {tuple(name.replace("-", "_").split(".")): value for name, value in settings.items()}
    return load_config(DEMO, {("weights", "buffer_bytes"): SEVERAL_BUFFERS, **overrides})


def run_under_fire(config: Config, aims: Aims, seconds: float, least: int, seed: int) -> Outcome:
    """Train to the end while roles die by their aims, and then by a ``Killer`` for ``seconds``."""
    directory = make_run_directory(config, datetime.now())
    config = prepare_model(config, directory)
    write_config(config, directory)
    lives: Counter[Role] = Counter()
    killer = Killer(directory, seconds, least, seed, lambda role: lives[role] > len(aims.get(role, ())))

    async def watch(_config: Config, _directory: Path, _address: str) -> None:
        await killer.strike()
        await asyncio.Event().wait()

    exit_code = train(config, directory, aimed_at(plan_run(config, directory), aims, lives), watch)
    steps = list(read_metrics(directory / "metrics.jsonl"))
    report = audit(read_trail(directory / JOURNAL), steps, has_finished(directory))
    return Outcome(directory, exit_code, summarise(directory), deaths_of(directory), report)


def aimed_at(plan: RunPlan, aims: Aims, lives: Counter[Role]) -> RunPlan:
    """The same plan; each life of a role is started with the next of its aims, while there are any, and counted."""

    def aim(command: RoleCommand) -> RoleCommand:
        role = role_of(command.name)
        life, lives[role] = lives[role], lives[role] + 1
        if life >= len(aims.get(role, ())):
            return command
        point, times = aims[role][life]
        start = command.arguments.index(PROGRAM[1])
        before, after = command.arguments[:start], command.arguments[start + 1 :]
        return replace(command, arguments=(*before, "benchmarks.chaos.aimed", point, str(times), *after))

    return replace(
        plan,
        hub=lambda address, name: aim(plan.hub(address, name)),
        learner=lambda address, name: aim(plan.learner(address, name)),
        actor=lambda address, name: aim(plan.actor(address, name)),
    )
