"""What the layout tests run in every layout: a fixed sequence of training steps, and everything it results in.

As a program it is one rank: ``python layout_job.py CHECKPOINT OUT LAYOUT...``, each LAYOUT a JSON object of Megatron
options. Several layouts run one after the other in the same processes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import save_file

from slime_async.config.schema import Config
from slime_async.learner.trainer import Trainer, TrainSequence
from slime_async.routing import NOT_RECORDED

LEARNING_RATE = 1e-3


def train_sequences(vocab_size: int = 33, count: int = 14, *, experts: bool = False) -> list[TrainSequence]:
    """Sequences of 1 to 17 tokens in groups of two, some stale, one group without advantage.

    With ``experts`` most have records of 2 of 4 experts in 2 layers, with gaps.
    """
    rng = np.random.default_rng(7)
    sequences = []
    for i in range(count):
        n = int(rng.integers(1, 18))
        staleness = rng.integers(0, 4, n)
        sequences.append(
            TrainSequence(
                token_ids=rng.integers(0, vocab_size, n).astype(np.int32),
                loss_mask=(np.arange(n) >= n // 3).astype(np.uint8),
                weight_mask=(staleness < 3).astype(np.uint8),
                behavior_logprobs=rng.normal(-3.5, 0.5, n).astype(np.float32),
                advantages=0.0 if i // 2 == 1 else float(rng.normal()),
                staleness=staleness,
                routed_experts=recorded_experts(np.random.default_rng(i), n) if experts and i % 3 else None,
                rewards=np.where(np.arange(n) == n - 1, float(i % 3), 0.0).astype(np.float32),
                group=i // 2,
            )
        )
    return sequences


def recorded_experts(rng: np.random.Generator, tokens: int) -> NDArray[np.int16]:
    chosen = rng.random((tokens, 2, 4)).argsort(-1)[..., :2].astype(np.int16)
    chosen[-1] = NOT_RECORDED
    return chosen


def meet(file: Path) -> None:
    """Join the other ranks, in a file: a port that was free a moment ago may be one of gloo's own by now."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)


def config_for(megatron: dict[str, Any], *, advantage: str = "grpo", **sections: Any) -> Config:
    """Several optimizer steps and several microbatches per batch."""
    learner = {"learning_rate": LEARNING_RATE, "optimizer_steps": 2, "microbatch_tokens": 48, "weight_decay": 0.1}
    algorithm = {"advantage": advantage, "entropy_coef": 0.01, "weight": "truncate", "weight_upper": 2.0}
    return Config(**{"learner": learner, "algorithm": algorithm, "megatron": megatron} | sections)


def run(config: Config, checkpoint: Path, out: Path) -> None:
    """Write ``out.json`` and ``out.safetensors``: what each step reported, log-probs and weights at the end."""
    trainer = Trainer.build(config, checkpoint)
    sequences = train_sequences(experts=trainer.model.architecture.experts is not None)
    supervised = [(s.token_ids, s.loss_mask) for s in sequences]
    results = [trainer.train_supervised(supervised, 1e-3)]
    results += [trainer.train_policy(sequences, version) for version in range(2)]
    logprobs = trainer.logprobs([s.token_ids for s in sequences])
    tensors = {name: tensor.detach().clone() for name, tensor in trainer.export()}
    if int(os.environ.get("RANK", "0")) == 0:
        out.with_suffix(".json").write_text(json.dumps([asdict(r) for r in results]))
        save_file(tensors | {"logprobs": torch.from_numpy(np.concatenate(logprobs))}, out.with_suffix(".safetensors"))
    trainer.close()


def main() -> None:
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for number, text in enumerate(sys.argv[3:]):
        layout = json.loads(text)
        meet(out / f"ranks{number}")
        advantage = layout.pop("advantage", "grpo")
        run(config_for(layout, advantage=advantage), checkpoint, out / f"layout{number}")


if __name__ == "__main__":
    main()
