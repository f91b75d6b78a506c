"""Layouts that hand one training to each other through checkpoints; see ``layout_job`` for how it is called.

The first layout begins the training, each further one goes on from its predecessor's checkpoint: every one writes its
checkpoint, trains two more batches and tells what they gave.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_job import config_for, meet, train_sequences

from slime_async.config import Config
from slime_async.learner.trainer import Counters, Trainer

DEADLINE_S = 60.0


def make_config(megatron: dict[str, Any]) -> Config:
    algorithm = {"entropy_coef": 0.01, "weight": "truncate", "weight_upper": 2.0, "kl_coef": 0.1}
    return config_for(megatron, algorithm=algorithm)


def begin_or_load(trainer: Trainer, source: Path | None) -> None:
    """Two batches of two optimizer steps each, or the checkpoint after them."""
    if source is None:
        for version in range(2):
            trainer.train_policy(train_sequences(), version)
    else:
        trainer.load_checkpoint(source, Counters(4, 1e-3, True), same_layout=False)


def two_more(trainer: Trainer) -> list[list[float]]:
    results = [trainer.train_policy(train_sequences(), version) for version in (2, 3)]
    return [[r.loss, r.grad_norm, r.metrics["loss/kl"]] for r in results]


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    source: Path | None = None
    for number, text in enumerate(sys.argv[3:]):
        layout = json.loads(text)
        meet(out / f"ranks{number}")
        trainer = Trainer.build(make_config(layout), model)
        begin_or_load(trainer, source)
        source = out / f"checkpoint{number}"
        if dist.get_rank() == 0:
            source.mkdir()
        dist.barrier()
        write = trainer.begin_checkpoint(source)
        results = two_more(trainer)
        assert write.is_over(DEADLINE_S)
        assert write.error is None
        write.finish()
        if dist.get_rank() == 0:
            (out / f"layout{number}.json").write_text(json.dumps(results))
        trainer.close()


if __name__ == "__main__":
    main()
