"""Any dataset of reasoning-gym as a single-turn task: made on the spot, judged by its own verifier, no download.

    [task]
    reward = "slime_async.actors.environments.reasoning:reward"
    isolate_reward = true       # some verifiers are slow

    [task.train.sums]
    factory = "slime_async.actors.environments.reasoning:source"
    arguments = { dataset = "chain_sum", seed = 0, config = { min_terms = 2, max_terms = 3 } }

Small models learn chain_sum, basic_arithmetic, products, simple_equations, leg_counting, spell_backward,
number_sorting, base_conversion, count_bits and countdown. Held-out tasks are the same dataset with another seed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

INSTRUCTION = "Give your final answer between <answer> and </answer>."
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
GENEROUS = frozenset({"game_of_life_halting", "coin_flip"})
"""Their verifiers accept almost anything, so nothing can be learnt from them"""
SEEDS_PER_SOURCE = 1_000_003
"""Apart by more than any source is long, so that sources of different seeds share no task"""


class ReasoningTasks:
    """A sequence of tasks, each made when it is asked for from the arguments and its index alone."""

    def __init__(self, dataset: str, seed: int, size: int, config: Mapping[str, Any], chat: bool) -> None:
        if not 1 <= size <= SEEDS_PER_SOURCE:
            raise ValueError(f"size = {size}: between 1 and {SEEDS_PER_SOURCE}")
        self._dataset = dataset
        self._seed = seed * SEEDS_PER_SOURCE
        self._size = size
        self._config = json.dumps(dict(config), sort_keys=True)
        self._chat = chat
        _make(dataset, self._seed, size, self._config)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        question = _make(self._dataset, self._seed, self._size, self._config)[index]["question"]
        text = f"{question}\n{INSTRUCTION}"
        where = {
            "dataset": self._dataset, "seed": self._seed, "size": self._size, "config": self._config, "index": index
        }  # fmt: skip
        if self._chat:
            return {"messages": [{"role": "user", "content": text}], "reasoning_gym": where}
        return {"prompt": f"{text}\n", "reasoning_gym": where}


def source(
    *, dataset: str, seed: int = 0, size: int = 10_000, config: Mapping[str, Any] | None = None, chat: bool = True
) -> ReasoningTasks:
    """``config`` goes to the dataset; ``chat`` renders questions as messages, otherwise as plain prompts.

    Raises ``ValueError`` for a dataset or a field of its configuration that does not exist.
    """
    if dataset in GENEROUS:
        raise ValueError(f"dataset = {dataset!r}: its verifier accepts almost any answer; take another")
    return ReasoningTasks(dataset, seed, size, config or {}, chat)


def reward(content: Mapping[str, Any], answer: str, finish_reason: str) -> float:
    """1.0 when the last ``<answer>`` satisfies the dataset's verifier in full, else 0.0.

    Partial credit is left out: many verifiers give some for a substring, which a policy soon finds out.
    """
    found = ANSWER.findall(answer)
    if finish_reason != "stop" or not found:
        return 0.0
    where = content["reasoning_gym"]
    tasks = _make(where["dataset"], where["seed"], where["size"], where["config"])
    try:
        return float(tasks.score_answer(found[-1].strip(), tasks[where["index"]]) >= 1.0)
    except Exception:  # noqa: BLE001 - verifiers raise all sorts on text that is no answer at all
        return 0.0


@functools.lru_cache(maxsize=64)
def _make(dataset: str, seed: int, size: int, config: str) -> Any:
    """reasoning-gym's dataset; it takes seconds to import, and only processes that look at tasks need it."""
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ValueError("these tasks need reasoning-gym: pip install 'slime-async[agents]'") from error
    try:
        return reasoning_gym.create_dataset(dataset, seed=seed, size=size, **json.loads(config))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's {dataset!r} with {config}: {error}") from error
