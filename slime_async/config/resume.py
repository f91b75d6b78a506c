"""What may change when a run is resumed, and what it was trained with and must stay.

Free is what changes where and how fast a run computes, how long it goes on, and what it tells; a layout of Megatron's
ranks is, as a checkpoint is read under any. Everything else made the weights what they are, or names the shape of
batches that are still queued. Deterministic runs also keep what only changes rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slime_async.config.fields import PASS_THROUGH, fields
from slime_async.config.schema import Config

FREE_SECTIONS = frozenset({"checkpoint", "evaluation", "hub", "sglang", "cluster", "loggers"})
FREE = frozenset(
    {
        "run.name",
        "run.directory",
        "run.steps",
        "run.log_interval_s",
        "run.view",
        "model.path",  # where it lies; what it is, the checkpoint knows
        "actor.count",
        "actor.device",
        "actor.max_restarts",
        "actor.startup_timeout_s",
        "actor.episode_timeout_s",
        "actor.drain_timeout_s",
        "actor.delay_s",
        "batch.queue_trajectories",
        "batch.queue_bytes",
        "learner.max_restarts",
        "learner.lease_timeout_s",
        "weights.backend",
        "weights.timeout_s",
        "warm_start.threads",
    }
)
"""By key"""
ROUNDING = frozenset(
    {
        "actor.slots",
        "actor.threads",
        "actor.max_running_requests",
        "learner.ranks",
        "learner.threads",
        "learner.microbatch_tokens",
        "megatron.tensor_model_parallel_size",
        "megatron.sequence_parallel",
        "megatron.pipeline_model_parallel_size",
        "megatron.context_parallel_size",
        "megatron.expert_model_parallel_size",
        "megatron.expert_tensor_parallel_size",
        "megatron.use_distributed_optimizer",
        "megatron.overlap_grad_reduce",
        "megatron.bucket_size",
        "megatron.recompute_granularity",
        "megatron.recompute_method",
        "megatron.recompute_num_layers",
        "megatron.recompute_modules",
    }
)
"""Free, unless the run is deterministic"""


def fixed_settings(config: Config) -> dict[str, Any]:
    """Every key that a resumed run must have as it was, with its value; None where it is not set."""
    free = FREE if config.run.deterministic else FREE | ROUNDING
    return {key: value for key, value in _plain(config) if key not in free and key.split(".")[0] not in FREE_SECTIONS}


def refused_changes(before: Config, after: Config) -> list[str]:
    """A line for each key that differs and must not; empty when ``after`` may carry on what ``before`` began."""
    old, new = fixed_settings(before), fixed_settings(after)
    return [
        f"{key} = {_shown(new, key)} cannot be set on resuming, the run has {_shown(old, key)}: leave it out, or begin "
        "a new run from the exported weights"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if settings.get(key) is not None else "nothing"


def _plain(config: Config) -> Iterator[tuple[str, Any]]:
    """Values as JSON has them; tables of other programs' keys are taken apart, those of sources stay whole."""
    table = config.model_dump(mode="json")
    for field in fields():
        value = table[field.section][field.name] if field.section else table[field.name]
        if field.name in PASS_THROUGH:
            yield from ((f"{field.name}.{key}", inner) for key, inner in value.items())
        else:
            yield field.key, value
