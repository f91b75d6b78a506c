"""Break a code of three digits from 0 to 2 in five guesses, in the sorting demo's alphabet.

    =012<eos>-1-=210<eos>21-=…        after each guess: the digits known to be right, and - for those that are not

The demonstrations come from an author who looks at that only half of the time: a digit that is known is kept, and one
that is not is replaced by another that was not tried there; or else the digit is any digit at all. Supervision teaches
the format and what could be made of what is known, never that it should be used. What RL adds is using it every time.
"""

from __future__ import annotations

import random

LENGTH = 3
DIGITS = 3
GUESSES = 5
"""Who keeps what is known breaks 65% of the codes by guessing the rest, all if no guess is repeated; anything: 17%"""
BEGIN, UNKNOWN, END = "=", "-", "<eos>"


class Codes:
    """A sequence of codes. A held-out source is another draw: there are only ``DIGITS ** LENGTH`` codes, and what is
    to be learnt is how to find them."""

    def __init__(self, seed: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"size = {size}: a source holds at least one task")
        self._seed = seed
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        return _any_code(random.Random(f"{self._seed}:{index}"))


class Author:
    """Guesses as the demonstrations do, with some ``attention`` to what is known."""

    def __init__(self, choice: random.Random, attention: float) -> None:
        self._choice = choice
        self._attention = attention
        self._open = [set(map(str, range(DIGITS))) for _ in range(LENGTH)]
        """What each digit can still be"""

    def guess(self) -> str:
        return "".join(self._digit(candidates) for candidates in self._open)

    def look(self, guess: str, known: str) -> None:
        """Take in what a guess has shown."""
        for candidates, digit, shown in zip(self._open, guess, known, strict=True):
            if shown == UNKNOWN:
                candidates.discard(digit)
            else:
                candidates.intersection_update({shown})

    def _digit(self, candidates: set[str]) -> str:
        looks = self._choice.random() < self._attention
        return self._choice.choice(sorted(candidates)) if looks else str(self._choice.randrange(DIGITS))


class Demonstrations:
    """(the game so far, the next guess)."""

    def __init__(self, seed: int, size: int, attention: float) -> None:
        self._seed = seed
        self._size = size
        self._attention = attention

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[str, str]:
        choice = random.Random(f"demonstration {self._seed}:{index}")
        code, known = _any_code(choice), UNKNOWN * LENGTH
        author, transcript = Author(choice, self._attention), BEGIN
        for _ in range(choice.randrange(GUESSES)):
            guess = author.guess()
            if guess == code:
                break
            known = reveal(code, guess, known)
            author.look(guess, known)
            transcript += f"{guess}{END}{known}{BEGIN}"
        return transcript, author.guess()


def train(*, seed: int = 0, size: int = 100_000) -> Codes:
    """Codes to train on."""
    return Codes(2 * seed, size)


def held_out(*, seed: int = 0, size: int = 10_000) -> Codes:
    """Another draw of codes."""
    return Codes(2 * seed + 1, size)


def demonstrations(seed: int, *, size: int = 50_000, attention: float = 0.5) -> Demonstrations:
    """The warm start's (prompt text, answer text) pairs."""
    return Demonstrations(seed, size, attention)


def reveal(code: str, guess: str, known: str) -> str:
    """What is known of the code after another guess."""
    return "".join(
        wanted if wanted in (digit, before) else UNKNOWN
        for wanted, digit, before in zip(code, guess, known, strict=True)
    )


def is_guess(answer: str) -> bool:
    return len(answer) == LENGTH and answer.isascii() and answer.isdigit()


def _any_code(choice: random.Random) -> str:
    return "".join(str(choice.randrange(DIGITS)) for _ in range(LENGTH))
