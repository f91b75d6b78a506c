"""Packs sequences into microbatches under a token budget, balanced over data-parallel ranks. No dependencies.

``pack`` promises, for any lengths of at least 1 and any number of ranks:

1. Every sequence is in exactly one microbatch of exactly one rank.
2. No microbatch holds more tokens than the budget, unless a single sequence is longer: it is then alone in its own.
3. Every rank gets equally many microbatches, since pipeline schedules and collectives run in lockstep, and a
   ``multiple`` of them, which interleaved schedules need. Some are empty only where there are fewer sequences than
   microbatches, and then no microbatch holds two.
4. The loads of any two ranks, and of any two microbatches, differ by at most the longest sequence.
5. The result depends on the arguments alone: all ranks compute the same packing without talking to each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packing:
    """``ranks[r][m]`` are the indices of the sequences in microbatch m of rank r, ascending."""

    ranks: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def microbatches(self) -> int:
        """Per rank; at least 1."""
        return len(self.ranks[0])


def pack(lengths: Sequence[int], budget_tokens: int, ranks: int = 1, multiple: int = 1) -> Packing:
    """Assign sequences of ``lengths`` tokens to the microbatches of ``ranks`` ranks.

    The longest are placed first, each into the emptiest microbatch (LPT scheduling, Graham 1969); when one does not fit
    there, every rank gets ``multiple`` more microbatches and placing starts over. Raises ``ValueError`` when a number
    is below 1.
    """
    if min(budget_tokens, ranks, multiple, *lengths) < 1:
        raise ValueError(
            f"budget_tokens = {budget_tokens}, ranks = {ranks}, multiple = {multiple} and every length (least: "
            f"{min(lengths, default=1)}) must be at least 1"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = multiple * max(1, -(-sum(lengths) // (budget_tokens * ranks * multiple)))
    while (bins := _place(lengths, order, budget_tokens, count * ranks)) is None:
        count += multiple
    return Packing(_share_out(bins, ranks))


_Bin = tuple[int, list[int]]
"""Load in tokens, and the sequences"""


def _place(lengths: Sequence[int], order: Sequence[int], budget_tokens: int, count: int) -> list[_Bin] | None:
    """``count`` microbatches, or None when they are too few for the budget."""
    heap = [(0, number) for number in range(count)]
    members: list[list[int]] = [[] for _ in range(count)]
    for i in order:
        load, number = heap[0]
        if load and load + lengths[i] > budget_tokens:
            return None
        heapq.heapreplace(heap, (load + lengths[i], number))
        members[number].append(i)
    return sorted(((load, members[number]) for load, number in heap), key=lambda b: (-b[0], b[1]))


def _share_out(bins: Sequence[_Bin], ranks: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Rounds of one microbatch per rank, heaviest first, the heaviest of a round to the rank with the least so far."""
    loads = [0] * ranks
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    for start in range(0, len(bins), ranks):
        by_load = sorted(range(ranks), key=lambda r: (loads[r], r))
        for rank, (load, members) in zip(by_load, bins[start : start + ranks], strict=True):
            loads[rank] += load
            shares[rank].append(tuple(sorted(members)))
    return tuple(tuple(share) for share in shares)
