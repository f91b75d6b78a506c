"""Guess a number from 00 to 31 by asking: the agent's demo, in the sorting demo's alphabet.

    =16<eos>-08<eos>+12<eos>        = begins; after each guess, + means higher and - means lower

The demonstrations come from an author who listens to the answers only half of the time: every other guess is any
number at all. Supervision teaches the format and which guesses fit what was said, never that guesses should fit. What
RL adds is using the answers, and then using them well: guesses near the middle of what is left.
"""

from __future__ import annotations

import random

NUMBERS = 32
GUESSES = 5
"""Halving finds 31 of the 32 numbers in five guesses; any number that fits what was said, about half of them"""
BEGIN, HIGHER, LOWER, END = "=", "+", "-", "<eos>"


class Secrets:
    """A sequence of secret numbers. A held-out task is another draw: there are only ``NUMBERS`` of them, and what is
    to be learnt is how to ask."""

    def __init__(self, seed: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"size = {size}: a source holds at least one task")
        self._seed = seed
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        return random.Random(f"{self._seed}:{index}").randrange(NUMBERS)


class Demonstrations:
    """(the game so far, the next guess), by the author who listens half of the time."""

    def __init__(self, seed: int, size: int, attention: float) -> None:
        self._seed = seed
        self._size = size
        self._attention = attention

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[str, str]:
        choice = random.Random(f"demonstration {self._seed}:{index}")
        secret, low, high, transcript = choice.randrange(NUMBERS), 0, NUMBERS - 1, BEGIN
        for _ in range(choice.randrange(GUESSES)):
            guess = self._guess(choice, low, high)
            if guess == secret:
                break
            low, high = (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))
            transcript += f"{guess:02d}{END}{hint(secret, guess)}"
        return transcript, f"{self._guess(choice, low, high):02d}"

    def _guess(self, choice: random.Random, low: int, high: int) -> int:
        listens = choice.random() < self._attention
        return choice.randint(low, high) if listens else choice.randrange(NUMBERS)


def train(*, seed: int = 0, size: int = 100_000) -> Secrets:
    """Secrets to train on."""
    return Secrets(2 * seed, size)


def held_out(*, seed: int = 0, size: int = 10_000) -> Secrets:
    """Another draw of secrets."""
    return Secrets(2 * seed + 1, size)


def demonstrations(seed: int, *, size: int = 50_000, attention: float = 0.5) -> Demonstrations:
    """The warm start's (prompt text, answer text) pairs."""
    return Demonstrations(seed, size, attention)


def hint(secret: int, guess: int) -> str:
    """Where the secret lies from a wrong guess."""
    return HIGHER if secret > guess else LOWER


def read_guess(answer: str) -> int | None:
    """The number that an answer names; None for anything but two digits."""
    return int(answer) if len(answer) == 2 and answer.isascii() and answer.isdigit() else None
