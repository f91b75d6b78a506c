"""Which ranks of the learner send the weights, and which part each: every parameter leaves from a rank that holds it.

::

    sources      engines, in lanes         step 0    step 1    step 2
    rank 0  A    lane 0: a                 A → a     C → a     …
    rank 3  B    lane 1: b                 B → b     A → b
    rank 1  C    lane 2: c                 C → c     B → c

An engine takes one part at a time. So that the sources send at the same moment all the same, the engines are dealt
into as many *lanes* as there are sources, each source has a group with each lane, and lane ``l`` takes the parts in the
order of the sources l, l + 1, …, round and round. With one source there is one lane, and one group of everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeVar

from slime_async.protocol import WeightManifest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Division:
    """The weights, divided among the source ranks; the same on every rank."""

    source_of: Mapping[str, int]
    """The rank that sends each of the model's units"""
    parts: Mapping[int, WeightManifest]
    """By source rank, rank 0 first"""


def divide(sizes: Mapping[str, int], held: Sequence[AbstractSet[str]], count: int) -> dict[str, int]:
    """The source rank of every parameter: one of ``count`` ranks, rank 0 among them, that hold everything together.

    ``sizes`` are the parameters' bytes, ``held`` the names of those that each rank holds. Parameters go, large ones
    first, to the source with the least so far of those that hold them.
    Raises ``ValueError`` where so few ranks do not hold everything, or some would have nothing to send.
    """
    sources = choose(sizes, held, count)
    missing = [name for name in sizes if not any(name in held[rank] for rank in sources)]
    if missing:
        raise ValueError(
            f"weights.sources = {count}: ranks {sources} of the learner do not hold {len(missing)} of {len(sizes)} "
            f"parameters, {missing[0]} among them; use a source for each pipeline stage and expert-parallel rank, or 1"
        )
    loads = dict.fromkeys(sources, 0)
    chosen = {}
    for name in sorted(sizes, key=lambda name: (sum(name in held[rank] for rank in sources), -sizes[name])):
        source = min((rank for rank in sources if name in held[rank]), key=lambda rank: loads[rank])
        chosen[name] = source
        loads[source] += sizes[name]
    if idle := [rank for rank, load in loads.items() if not load]:
        raise ValueError(f"weights.sources = {count} leaves nothing for ranks {idle} of the learner: use fewer")
    return {name: chosen[name] for name in sizes}


def choose(sizes: Mapping[str, int], held: Sequence[AbstractSet[str]], count: int) -> list[int]:
    """``count`` ranks, rank 0 first: each next one holds the most of what none before it holds, then of what few do.

    Of equals, the one furthest from the others: neighbours are tensor-parallel peers, which gather for each other.
    """
    if not 1 <= count <= len(held):
        raise ValueError(f"weights.sources = {count}, but the learner has {len(held)} ranks: use 1 to {len(held)}")
    chosen = [0]
    while len(chosen) < count:
        holders = {name: sum(name in held[rank] for rank in chosen) for name in sizes}

        def relief(rank: int, holders: Mapping[str, int] = holders) -> tuple[int, float, int]:
            new_bytes = sum(sizes[name] for name in held[rank] if not holders[name])
            bytes_relieved = sum(sizes[name] / (1 + holders[name]) for name in held[rank])
            return new_bytes, bytes_relieved, min(abs(rank - other) for other in chosen)

        chosen.append(max((rank for rank in range(len(held)) if rank not in chosen), key=relief))
    return chosen


def lanes(engines: Sequence[T], sources: int) -> list[tuple[T, ...]]:
    """The engines, dealt into at most as many lanes as there are sources."""
    return [tuple(engines[i::sources]) for i in range(min(sources, len(engines)))]


def sources_of_lane(lane: int, sources: int) -> list[int]:
    """The sources by number, in the order in which a lane takes their parts."""
    return [(lane + step) % sources for step in range(sources)]


def lanes_of_source(source: int, sources: int, lanes: int) -> list[int]:
    """The lanes in the order in which a source sends to them: at every step the one that wants it then, if any."""
    return [lane for step in range(sources) if (lane := (source - step) % sources) < lanes]
