"""The promises of slime_async.packing, one test each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_async.packing import Packing, pack

LENGTHS = st.lists(st.integers(1, 100), max_size=60)
BUDGET = st.integers(1, 300)
RANKS = st.integers(1, 5)


def loads(packing: Packing, lengths: list[int]) -> list[list[int]]:
    return [[sum(lengths[i] for i in m) for m in rank] for rank in packing.ranks]


@given(LENGTHS, BUDGET, RANKS)
def test_every_sequence_is_packed_exactly_once(lengths: list[int], budget: int, ranks: int) -> None:
    packed = [i for rank in pack(lengths, budget, ranks).ranks for m in rank for i in m]
    assert sorted(packed) == list(range(len(lengths)))


@given(LENGTHS, BUDGET, RANKS)
def test_only_a_sequence_alone_exceeds_the_budget(lengths: list[int], budget: int, ranks: int) -> None:
    for rank in pack(lengths, budget, ranks).ranks:
        for microbatch in rank:
            assert len(microbatch) <= 1 or sum(lengths[i] for i in microbatch) <= budget


@given(LENGTHS, BUDGET, RANKS)
def test_all_ranks_get_equally_many_microbatches(lengths: list[int], budget: int, ranks: int) -> None:
    packing = pack(lengths, budget, ranks)
    assert len(packing.ranks) == ranks
    assert {len(rank) for rank in packing.ranks} == {packing.microbatches}
    assert packing.microbatches >= 1


@given(LENGTHS, BUDGET, RANKS, st.integers(1, 4))
def test_microbatches_come_in_multiples(lengths: list[int], budget: int, ranks: int, multiple: int) -> None:
    packing = pack(lengths, budget, ranks, multiple)
    assert packing.microbatches % multiple == 0
    assert sorted(i for rank in packing.ranks for m in rank for i in m) == list(range(len(lengths)))


@given(LENGTHS, BUDGET, RANKS, st.integers(1, 4))
def test_a_microbatch_is_empty_only_when_no_other_holds_two(
    lengths: list[int], budget: int, ranks: int, multiple: int
) -> None:
    sizes = [len(m) for rank in pack(lengths, budget, ranks, multiple).ranks for m in rank]
    assert min(sizes) > 0 or max(sizes) <= 1


@given(LENGTHS.filter(bool), BUDGET, RANKS)
def test_loads_differ_by_at_most_the_longest_sequence(lengths: list[int], budget: int, ranks: int) -> None:
    by_rank = loads(pack(lengths, budget, ranks), lengths)
    totals = [sum(rank) for rank in by_rank]
    assert max(totals) - min(totals) <= max(lengths)
    every = [load for rank in by_rank for load in rank]
    assert max(every) - min(every) <= max(lengths)


def test_equal_sequences_share_evenly() -> None:
    assert loads(pack([13] * 256, 1700, 2), [13] * 256) == [[1664], [1664]]


def test_no_sequences_give_one_empty_microbatch_per_rank() -> None:
    assert pack([], 10, 2).ranks == (((),), ((),))


@pytest.mark.parametrize(("lengths", "budget", "ranks"), [([1], 0, 1), ([1], 1, 0), ([0], 1, 1)])
def test_numbers_below_one_are_refused(lengths: list[int], budget: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        pack(lengths, budget, ranks)
