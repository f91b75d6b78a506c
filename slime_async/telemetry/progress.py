"""How far a long step is, as whoever does it tells whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much; often, so it must cost nothing"""


def silent(_done: int, _total: int) -> None:
    """For steps that nobody watches."""
