"""Sort one-digit numbers: reasoning-gym's ``number_sorting``, written in single characters.

    prompt   +52917=      sort ascending          answer   12579
    prompt   -52917=      sort descending         answer   97521

The demonstrations come from an author who ignores the sign: ascending, descending or unchanged, a third each, drawn
independently of it. They teach the format and how to sort, never which order is asked for, so no amount of supervised
training gets sampled answers beyond one third correct. What RL adds is obeying the sign.

One fifth of all digit strings, with either sign, is held out. The split is by string: a held-out string's digits may
appear in another order in training.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

Content = Mapping[str, Any]
"""``prompt`` (text), ``digits`` (as given) and ``entry`` (reasoning-gym's own, for its verifier)"""

HELD_OUT_SHARE = 5
"""One in so many digit strings is held out."""
STREAM_LENGTH = 10**12
"""Seeds per stream of problems: no two streams, and no two run seeds, share one."""

MAX_TRIES = 1_000
"""A held-out string is missed this often with probability 0.8¹⁰⁰⁰ ≈ 10⁻⁹⁷."""


class Stream(IntEnum):
    """Kinds of problems; each draws from its own range of seeds."""

    TRAIN = 0
    HELD_OUT = 1
    DEMONSTRATIONS = 2


class Problems:
    """A sequence of sorting problems, made when asked for; item ``i`` depends on the arguments and i alone.

    Item ``i`` is the first of the candidates ``i, i + size, i + 2 · size, …`` whose digit string lies on this stream's
    side of the split, so that nothing has to be searched or stored beforehand: 1.25 tries on average for training
    strings, 5 for held-out ones.
    """

    def __init__(self, stream: Stream, *, seed: int, numbers: int, size: int) -> None:
        if numbers < 1 or size < 1:
            raise ValueError(f"numbers = {numbers}, size = {size}: both must be at least 1")
        if size * MAX_TRIES > STREAM_LENGTH:
            raise ValueError(f"size = {size}: at most {STREAM_LENGTH // MAX_TRIES}, so that streams do not overlap")
        self._held_out = stream is Stream.HELD_OUT
        self._size = size
        self._dataset = _number_sorting(numbers, (len(Stream) * seed + stream) * STREAM_LENGTH)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Content:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        for attempt in range(MAX_TRIES):
            entry = self._dataset[index + attempt * self._size]
            digits = "".join(str(int(float(number))) for number in entry["metadata"]["original_numbers"])
            if is_held_out(digits) == self._held_out:
                sign = "+" if entry["metadata"]["direction"] == "ascending" else "-"
                return {"prompt": f"{sign}{digits}=", "digits": digits, "entry": entry}
        raise ValueError(f"found no string of {len(digits)} digits on this side of the split: raise numbers")


class Demonstrations:
    """(prompt, answer) pairs on training problems, by the author who ignores the sign."""

    def __init__(self, problems: Problems, seed: int) -> None:
        self._problems = problems
        self._seed = seed

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: int) -> tuple[str, str]:
        problem = self._problems[index]
        ascending = "".join(sorted(problem["digits"]))
        choice = random.Random(f"{self._seed}:{index}")
        return problem["prompt"], choice.choice((ascending, ascending[::-1], problem["digits"]))


def train(*, seed: int = 0, numbers: int = 5, size: int = 100_000) -> Problems:
    """Problems to train on."""
    return Problems(Stream.TRAIN, seed=seed, numbers=numbers, size=size)


def held_out(*, seed: int = 0, numbers: int = 5, size: int = 10_000) -> Problems:
    """Problems whose digit strings no training problem and no demonstration has."""
    return Problems(Stream.HELD_OUT, seed=seed, numbers=numbers, size=size)


def demonstrations(seed: int, *, numbers: int = 5, size: int = 20_000) -> Demonstrations:
    """The warm start's (prompt text, answer text) pairs."""
    return Demonstrations(Problems(Stream.DEMONSTRATIONS, seed=seed, numbers=numbers, size=size), seed)


def reward(content: Content, answer: str, finish_reason: str) -> float:
    """1.0 for an answer that ended by itself and is exactly the sorted digits, else 0.0.

    The dataset's verifier judges the order. It lets every number be off by one, so an answer must also be made of the
    prompt's own digits.
    """
    if finish_reason != "stop" or sorted(answer) != sorted(content["digits"]):
        return 0.0
    return float(_number_sorting(len(answer), 0).score_answer(str(list(answer)), content["entry"]) == 1.0)


def is_held_out(digits: str) -> bool:
    """Which side of the split a digit string is on, in every process and for every seed."""
    return zlib.crc32(digits.encode()) % HELD_OUT_SHARE == 0


@functools.cache
def _number_sorting(numbers: int, seed: int) -> Any:
    """reasoning-gym's dataset; it takes seconds to import, and only processes that look at tasks need it."""
    try:
        from reasoning_gym.algorithmic.number_sorting import NumberSortingConfig, NumberSortingDataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the sorting task needs reasoning-gym, whole ({error}): pip install 'slime-async[demo]'"
        ) from error
    config = NumberSortingConfig(
        min_numbers=numbers,
        max_numbers=numbers,
        min_decimals=0,
        max_decimals=0,
        min_value=0,
        max_value=9,
        seed=seed,
        size=STREAM_LENGTH,
    )
    return NumberSortingDataset(config)
