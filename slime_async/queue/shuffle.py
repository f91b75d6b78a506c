"""A keyed permutation of ``0 … size − 1`` that is computed entry by entry, for sources too large to shuffle in memory.

A balanced Feistel network permutes ``0 … 4^k − 1``, the smallest such range that holds ``size``, whatever its round
function is. Values outside ``size`` are sent through it again until they fall inside (*cycle walking*: fewer than
four rounds on average), which keeps it a permutation of the smaller range (Black and Rogaway, 2002).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

ROUNDS = 8
"""Four suffice for large ranges; small ones need more to mix"""
MIX = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: multiplying by it carries low bits into the high ones"""
MASK_64 = (1 << 64) - 1


@lru_cache(maxsize=256)
def _round_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{source}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def permuted(position: int, size: int, *, seed: int, source: str, epoch: int) -> int:
    """Where ``position`` goes in the order of (seed, source, epoch); constant memory, about 10 µs."""
    assert 0 <= position < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    keys = _round_keys(seed, source, epoch)
    value = position
    while True:
        left, right = value >> half_bits, value & half_mask
        for key in keys:
            mixed = ((right ^ key) * MIX) & MASK_64
            mixed = ((mixed ^ (mixed >> 29)) * MIX) & MASK_64
            left, right = right, left ^ ((mixed >> 32) & half_mask)
        value = left << half_bits | right
        if value < size:
            return value
