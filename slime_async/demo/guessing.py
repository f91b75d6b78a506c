"""Find a number from 00 to 31 in five guesses, in the sorting demo's alphabet.

    00-31=17<eos>00-16=08<eos>09-16=12<eos>        after each guess: from where to where the number can still be

The demonstrations come from an author who looks at the range only half of the time: every other guess is any number at
all. Supervision teaches the format and what a guess within the range is, never that guesses should be within it. What
RL adds is looking every time, and then guessing near the middle.
"""

from __future__ import annotations

import random

NUMBERS = 32
GUESSES = 5
"""Halving finds 31 of the 32 numbers in five guesses; random guesses within the range find half, any guesses a sixth"""
END = "<eos>"


class Secrets:
    """A sequence of secret numbers. A held-out source is another draw: there are only ``NUMBERS`` of them, and what is
    to be learnt is how to search."""

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
    """(the game so far, the next guess), by the author who looks half of the time."""

    def __init__(self, seed: int, size: int, attention: float) -> None:
        self._seed = seed
        self._size = size
        self._attention = attention

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[str, str]:
        choice = random.Random(f"demonstration {self._seed}:{index}")
        secret, low, high = choice.randrange(NUMBERS), 0, NUMBERS - 1
        transcript = show(low, high)
        for _ in range(choice.randrange(GUESSES)):
            guess = self._guess(choice, low, high)
            if guess == secret:
                break
            low, high = narrow(low, high, secret, guess)
            transcript += f"{guess:02d}{END}{show(low, high)}"
        return transcript, f"{self._guess(choice, low, high):02d}"

    def _guess(self, choice: random.Random, low: int, high: int) -> int:
        looks = choice.random() < self._attention
        return choice.randint(low, high) if looks else choice.randrange(NUMBERS)


def train(*, seed: int = 0, size: int = 100_000) -> Secrets:
    """Secrets to train on."""
    return Secrets(2 * seed, size)


def held_out(*, seed: int = 0, size: int = 10_000) -> Secrets:
    """Another draw of secrets."""
    return Secrets(2 * seed + 1, size)


def demonstrations(seed: int, *, size: int = 50_000, attention: float = 0.5) -> Demonstrations:
    """The warm start's (prompt text, answer text) pairs."""
    return Demonstrations(seed, size, attention)


def narrow(low: int, high: int, secret: int, guess: int) -> tuple[int, int]:
    """What a wrong guess leaves of the range."""
    return (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))


def show(low: int, high: int) -> str:
    """The range as the policy sees it."""
    return f"{low:02d}-{high:02d}="


def read_guess(answer: str) -> int | None:
    """The number that an answer names; None for anything but two digits."""
    return int(answer) if len(answer) == 2 and answer.isascii() and answer.isdigit() else None
