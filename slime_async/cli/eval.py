"""``slime-async eval``: held-out accuracy of a checkpoint, in this process, with the embedded engine."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from slime_async.cli.bars import progress
from slime_async.cli.common import config_of
from slime_async.cli.flags import add_config_flags
from slime_async.config import Config, ConfigError
from slime_async.evaluation import EvaluationStatistics
from slime_async.trajectory import WeightId

if TYPE_CHECKING:
    from slime_async.protocol import EvaluationResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Hugging Face checkpoint directory")
    parser.add_argument(
        "--config", metavar="CONFIG", type=Path, required=True, help="TOML file with the task; any key is also a flag"
    )
    parser.add_argument("--source", metavar="NAME", help="one of [task.evaluation.NAME] [all of them]")
    parser.add_argument("--tasks", metavar="INT", type=int, help="tasks per source [evaluation.tasks]")
    add_config_flags(parser)


def run(parsed: argparse.Namespace) -> int:
    config = config_of(parsed)
    sources = list(config.task.evaluation)
    if not sources:
        raise ConfigError(f"{parsed.config} has no evaluation source: add a table [task.evaluation.NAME]")
    if parsed.source is not None and parsed.source not in sources:
        raise ConfigError(f"--source {parsed.source}: {parsed.config} has {', '.join(sources)}")
    if not (parsed.checkpoint / "config.json").is_file():
        raise ConfigError(f"{parsed.checkpoint} is no checkpoint: it has no config.json")
    tasks = config.evaluation.tasks if parsed.tasks is None else parsed.tasks
    if tasks < 1:
        raise ConfigError(f"--tasks {tasks}: must be at least 1")
    for source in sources if parsed.source is None else [parsed.source]:
        result = evaluate(config, parsed.checkpoint, source, tasks)
        print(result_line(result, config.evaluation.samples))
    return 0


def result_line(result: EvaluationResult, samples: int) -> str:
    """What came out, and how far it can be trusted."""
    statistics = EvaluationStatistics.of(result, samples)
    several = [f"pass@{k} {value:.4f}" for k, value in statistics.pass_at.items() if k > 1]
    parts = [
        f"{result.name}: accuracy {statistics.accuracy:.4f} ({statistics.accuracy_low:.4f} to "
        f"{statistics.accuracy_high:.4f})",
        *several,
        f"mean reward {statistics.reward_mean:.4f}",
        f"{result.tasks} tasks" + (f", {samples} answers each" if several else ""),
        f"{result.failed} failed",
    ]
    return ", ".join(parts)


def evaluate(config: Config, checkpoint: Path, source: str, tasks: int) -> EvaluationResult:
    """Play the first ``tasks`` tasks of ``source`` with the weights in ``checkpoint``."""
    from slime_async.actors.embedded.engine import EmbeddedEngine
    from slime_async.actors.evaluate import evaluate_checkpoint

    engine = EmbeddedEngine(
        checkpoint,
        slots=config.actor.max_running_requests,
        max_context=config.sampling.max_context_tokens,
        device=config.actor.device,
        threads=config.actor.threads,
        weights=WeightId(0, 0),
    )
    with progress(f"evaluating {checkpoint.name} on {source}", "tasks") as on_progress:
        return asyncio.run(evaluate_checkpoint(config, checkpoint, source, tasks, engine, on_progress))
