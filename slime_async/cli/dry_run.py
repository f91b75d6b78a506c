"""``slime-async train CONFIG --dry-run``: everything of a run but its size, on this machine's CPU.

The same processes, task functions, chat template, queue, algorithm and weight updates, with a tiny model of the same
architecture, two small batches, and the sample data that sources name as ``dry_run``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slime_async.config import Config, ConfigError
from slime_async.config.checks import complaints
from slime_async.config.schema import SourceConfig

STEPS = 2
GROUPS = 2
GROUP_SIZE = 2
NEW_TOKENS = 16
CONTEXT_TOKENS = 1024
EVALUATION_TASKS = 4
ENTROPY = 1e-3
TINY: dict[str, int] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
}
"""What makes a model small, by Hugging Face's names; architecture, vocabulary and tokenizer stay"""


def shrink(config: Config, directory: Path, new_tokens: int = NEW_TOKENS) -> Config:
    """The configuration of the dry run; a tiny checkpoint is written below ``directory``.

    ``new_tokens`` is the most that a turn may sample. Raises ``ConfigError`` when the small numbers clash with others
    that stay.
    """
    changes = _changes(config, new_tokens) | {"model": {"path": str(tiny_model(config, directory)), "dtype": "float32"}}
    small = config.model_copy(
        update={name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
        | {"sglang": {}, "megatron": {k: v for k, v in config.megatron.items() if "parallel" not in k}}
    )
    if clashes := complaints(small):
        raise ConfigError("\n".join(f"--dry-run: {clash}" for clash in clashes))
    return small


def _changes(config: Config, new_tokens: int) -> dict[str, dict[str, Any]]:
    """What a dry run has in small, by section. Fresh weights answer nothing right and never stop: so what would leave
    all of their answers out of training is off, and the entropy's gradient is computed where advantages have none."""
    minibatches = config.learner.optimizer_steps
    return {
        "run": {"steps": STEPS, "name": f"{config.run.name}-dry-run", "log_interval_s": 1.0},
        "task": {
            **{family: _samples(getattr(config.task, family)) for family in ("train", "evaluation")},
            "on_truncated": "train",
            "overlong_tokens": min(config.task.overlong_tokens, new_tokens // 4),
            "filter": "",
        },
        "sampling": {
            "max_new_tokens": min(config.sampling.max_new_tokens, new_tokens),
            "max_context_tokens": min(config.sampling.max_context_tokens, CONTEXT_TOKENS + new_tokens),
        },
        "actor": {
            "count": 1,
            "engine": "embedded",
            "device": "cpu",
            "threads": 1,
            "slots": GROUPS * GROUP_SIZE * 2,
            "max_running_requests": GROUPS * GROUP_SIZE * 2,
        },
        "batch": {
            "groups": -(-GROUPS // minibatches) * minibatches,
            "group_size": GROUP_SIZE,
            "queue_trajectories": None,
            "drop_equal_rewards": False,
        },
        "algorithm": {"entropy_coef": config.algorithm.entropy_coef or ENTROPY},
        "weights": {"backend": "gloo"},
        "learner": {"ranks": 1, "threads": 1, "microbatch_tokens": 2 * (CONTEXT_TOKENS + new_tokens)},
        "warm_start": {"steps": min(config.warm_start.steps, STEPS), "control_steps": 0},
        "evaluation": {
            "tasks": EVALUATION_TASKS,
            "interval_versions": 1 if config.evaluation.interval_versions else None,
        },
    }


def tiny_model(config: Config, directory: Path) -> Path:
    """A checkpoint with fresh weights: of ``model.path``'s architecture and tokenizer where it is here already, of
    Qwen3's otherwise."""
    path = Path(config.model.path)
    checkpoint = directory / "checkpoints" / "tiny"
    if ":" in config.model.path:
        from slime_async.objects import load_callable

        load_callable(config.model.path, "model.path")(checkpoint, config.run.seed)
    elif (path / "config.json").is_file():
        shrink_checkpoint(path, checkpoint, config.run.seed)
    else:
        from slime_async.demo.chat import make_checkpoint

        make_checkpoint(checkpoint, config.run.seed)
    return checkpoint


def shrink_checkpoint(source: Path, target: Path, seed: int) -> None:
    """The architecture and tokenizer of ``source``, with few and small layers of fresh weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    table = json.loads((source / "config.json").read_text())
    table |= {name: size for name, size in TINY.items() if name in table}
    table.pop("layer_types", None)  # one per layer: made anew for as many as there are now
    architecture = AutoConfig.for_model(table.pop("model_type"), **table)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)


def _samples(sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
    return {
        name: source.model_copy(update={"arguments": source.arguments | source.dry_run})
        for name, source in sources.items()
    }
