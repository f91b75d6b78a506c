"""Routed experts from requests to trajectories, against a recomputation that keeps one record per token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_async.actors.engine import GenerateRequest, Generation
from slime_async.actors.environment import Turn
from slime_async.actors.episode import EpisodeBuilder
from slime_async.actors.policy import EnginePolicy, EpisodeLimits
from slime_async.actors.recorder import record
from slime_async.branches import branches
from slime_async.routing import NOT_RECORDED, Routes, lay_out, routed_experts
from slime_async.trajectory import TaskRef, VersionSpan
from tests.actors.scripted import SAMPLING, answer, weights

REF = TaskRef(0, "s", 0)
LAYERS, EXPERTS_PER_TOKEN = 2, 3


def rows(tokens: int, mark: int) -> Routes:
    """What a request reports that is number ``mark``: all tokens but the last."""
    routes = np.full((tokens, LAYERS, EXPERTS_PER_TOKEN), mark, dtype=np.int16)
    routes[-1] = NOT_RECORDED
    return routes


@dataclass
class RecordingEngine:
    """Its answers are cut as told: how many tokens, whether they end the answer, whether they are recorded."""

    cuts: list[tuple[int, bool, bool]]
    first_to_read: dict[tuple[int, ...], int] = field(default_factory=dict)
    """By a token and all before it: the number of the first recorded request that read it"""
    requests: int = 0

    async def generate(self, request: GenerateRequest) -> Generation:
        count, ends, recorded = self.cuts[self.requests]
        mark, self.requests = self.requests, self.requests + 1
        part = answer([mark] * count, reason="stop" if ends else "abort")
        if not recorded:
            return part
        tokens = (*request.prompt_ids, *part.output_ids)
        for end in range(1, len(tokens)):
            self.first_to_read.setdefault(tokens[:end], mark)
        return replace(part, routed_experts=rows(len(tokens), mark))

    async def abort(self, request_id: str) -> None:
        raise AssertionError(f"{request_id} has been answered: nothing is left to abort")

    def expected(self, token_ids: list[int]) -> list[int]:
        return [self.first_to_read.get(tuple(token_ids[: i + 1]), NOT_RECORDED) for i in range(len(token_ids))]


pieces = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=3)
conversations = st.lists(st.tuples(st.integers(0, 2), pieces, st.booleans()), min_size=1, max_size=4)
"""Per turn: how many tokens come from outside before it, the cuts of its answer, whether its last part is recorded"""


@given(conversations)
def test_every_token_has_the_experts_of_the_first_request_that_read_it(
    script: list[tuple[int, list[tuple[int, bool]], bool]],
) -> None:
    cuts = [
        cut
        for _, parts, last_recorded in script
        for cut in [*((count, False, recorded) for count, recorded in parts), (2, True, last_recorded)]
    ]
    engine = RecordingEngine(cuts)
    policy = EnginePolicy(engine, replace(SAMPLING, max_new_tokens=64), EpisodeLimits(512), seed=0)

    async def play() -> EpisodeBuilder:
        builder = EpisodeBuilder()
        for inserted, _, _ in script:
            builder.add(await policy.sample([*builder.token_ids, 99, *[98] * inserted]))
        return builder

    trajectory = asyncio.run(play()).finish(1.0).to_trajectory(REF, 0, 0)
    column = routed_experts(trajectory)
    expected = engine.expected(trajectory.token_ids.tolist())
    if column is None:
        assert set(expected) == {NOT_RECORDED}
        return
    assert column.shape == (len(expected), LAYERS, EXPERTS_PER_TOKEN)
    assert column[:, 0, 0].tolist() == expected
    assert (column == column[:, :1, :1]).all()
    again = routed_experts(record(policy.turns).finish(1.0).to_trajectory(REF, 0, 0))
    assert again is not None
    assert (again == column).all()


def test_an_answer_that_an_engines_death_cut_is_filled_by_the_one_that_goes_on_from_it() -> None:
    engine = RecordingEngine([(2, False, True), (2, False, False), (1, True, True)])
    policy = EnginePolicy(engine, SAMPLING, EpisodeLimits(64), seed=0)
    turn = asyncio.run(policy.sample([50, 51]))
    assert turn.output_ids == [0, 0, 1, 1, 2]
    assert turn.routed_experts is not None
    assert turn.routed_experts[:, 0, 0].tolist() == [0, 0, 0, 2, 2, 2, NOT_RECORDED]


def test_a_turn_keeps_only_what_no_earlier_turn_has() -> None:
    engine = RecordingEngine([(2, True, True), (1, True, True)])
    policy = EnginePolicy(engine, SAMPLING, EpisodeLimits(64), seed=0)

    async def play() -> Turn:
        first = await policy.sample([50])
        return await policy.sample([*first.prompt_ids, *first.output_ids, 51])

    second = asyncio.run(play())
    assert second.routed_experts is not None
    assert second.routed_experts[:, 0, 0].tolist() == [1, 1, NOT_RECORDED]  # an answer's last token, and what followed


def recorded_turn(prompt: list[int], output: list[int], mark: int | None) -> Turn:
    routes = None if mark is None else rows(len(prompt) + len(output), mark)
    return Turn(prompt, output, [-0.5] * len(output), (VersionSpan(0, weights(0)),), "stop", routes)


def test_a_fork_takes_the_records_along_and_a_branch_without_any_has_none() -> None:
    root = EpisodeBuilder()
    root.add(recorded_turn([1, 2], [3, 4], 5))
    fork, other = root.fork(), root.branch("critic")
    root.add(recorded_turn([1, 2, 3, 4, 9], [6], 7))
    fork.add(recorded_turn([1, 2, 3, 4], [8], None))
    other.add(recorded_turn([1], [2], None))
    trajectory = root.finish(1.0).to_trajectory(REF, 0, 0)
    column = routed_experts(trajectory)
    assert column is not None
    assert [column[branch.tokens, 0, 0].tolist() for branch in branches(trajectory)] == [
        [5, 5, 5, 7, 7, NOT_RECORDED],
        [5, 5, 5, NOT_RECORDED, NOT_RECORDED],
        [NOT_RECORDED, NOT_RECORDED],
    ]


def test_records_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 rows of routed experts for 1 \+ 2 tokens"):
        Turn([1], [2, 3], [0.0, 0.0], (VersionSpan(0, weights(0)),), "stop", rows(4, 1))
    with pytest.raises(ValueError, match=r"one episode has one model"):
        lay_out([(3, rows(3, 1)), (3, rows(3, 1)[:, :1])], 3)
