"""The supervised phase before RL, and the control experiment that shows what it could reach alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from slime_async.config import Config
from slime_async.learner.trainer import Trainer
from slime_async.objects import load_callable

Demonstration = tuple[str, str]
Progress = Callable[[str, int, int, float], None]
"""Called with (phase, step, steps, loss) after every step"""

CONTROL_CHECKPOINT = "supervised_only"
"""Where below the run's checkpoints the control experiment leaves its weights"""


def warm_start(config: Config, trainer: Trainer, checkpoints: Path, progress: Progress) -> None:
    """Every rank runs this. RL begins from the weights after ``warm_start.steps``, with a fresh optimizer.

    With ``warm_start.control_steps`` a copy is trained that much further, saved, and then forgotten: RL starts from
    bitwise the same weights with the control as without it.
    """
    if not config.warm_start.steps:
        return
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    phase = WarmStart(config, trainer, tokenizer)
    phase.run("warm_start", config.warm_start.steps, progress)
    if config.warm_start.control_steps:
        state = trainer.snapshot_state()
        phase.run("control", config.warm_start.control_steps, progress)
        trainer.save_hf(checkpoints / CONTROL_CHECKPOINT)
        trainer.restore_state(state)
    trainer.reset_optimizer(config.learner.learning_rate)


class WarmStart:
    """Trains on demonstrations drawn with replacement; ``run`` goes on where the last call stopped."""

    def __init__(self, config: Config, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._trainer = trainer
        self._tokenizer = tokenizer
        factory = load_callable(config.warm_start.demonstrations, "warm_start.demonstrations")
        self._demonstrations: Sequence[Demonstration] = factory(config.run.seed)
        self._random = random.Random(config.run.seed)

    def run(self, name: str, steps: int, progress: Progress) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(self._config.warm_start.threads)
        try:
            for step in range(1, steps + 1):
                drawn = [self._draw() for _ in range(self._config.warm_start.batch_size)]
                result = self._trainer.train_supervised(drawn, self._config.warm_start.learning_rate)
                progress(name, step, steps, result.loss)
        finally:
            torch.set_num_threads(threads)

    def _draw(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids [T] and the mask [T] of what is to be learnt: the answer and its end."""
        prompt, answer = self._demonstrations[self._random.randrange(len(self._demonstrations))]
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = [*self._tokenizer.encode(answer, add_special_tokens=False), self._tokenizer.eos_token_id]
        mask = np.zeros(len(prompt_ids) + len(answer_ids), dtype=np.uint8)
        mask[len(prompt_ids) :] = 1
        return np.array(prompt_ids + answer_ids, dtype=np.int32), mask
