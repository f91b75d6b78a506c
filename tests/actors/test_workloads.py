from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slime_async.actors.engine import SamplingParams
from slime_async.actors.environment import Task, Turn
from slime_async.actors.workloads import LogNormal, answers, even_share, forced_answer, tool_episode, tool_episodes
from slime_async.trajectory import TaskRef, VersionSpan, WeightId

SAMPLING = SamplingParams(max_new_tokens=50, stop_token_ids=(3,))


class Echo:
    """A policy that says as many tokens as it is allowed to."""

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []

    async def sample(self, prompt_ids: Sequence[int], sampling: SamplingParams | None = None) -> Turn:
        assert sampling is not None
        self.asked.append(sampling)
        ids = [7] * sampling.max_new_tokens
        return Turn(list(prompt_ids), ids, [0.0] * len(ids), (VersionSpan(0, WeightId(1, 0)),), "length")

    def room(self, prompt_ids: Sequence[int]) -> int:
        return 1000


def task(content: Any, sample: int = 0) -> Task:
    return Task(TaskRef(0, "s", 0), sample, content, SAMPLING, tokenizer=None)  # type: ignore[arg-type]


def test_lengths_follow_from_task_and_sample_alone() -> None:
    source, again = (answers(median=20, sigma=0.9, longest=100) for _ in range(2))
    drawn = [[_tokens(s[i], k) for i in range(40) for k in range(8)] for s in (source, again)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 30
    assert np.median(drawn[0]) == pytest.approx(20, rel=0.15)
    assert max(drawn[0]) <= 100


def test_another_seed_draws_others() -> None:
    one, other = answers(median=20, sigma=0.9, longest=100), answers(median=20, sigma=0.9, longest=100, seed=1)
    assert [_tokens(one[i], 0) for i in range(20)] != [_tokens(other[i], 0) for i in range(20)]


def test_an_answer_has_its_length_whatever_the_model_says() -> None:
    content, policy = answers(median=20, sigma=0.9, longest=100)[3], Echo()
    episode = asyncio.run(forced_answer(task(content, 5), policy))
    assert int(episode.loss_mask.sum()) == _tokens(content, 5)
    assert policy.asked[0] == replace(SAMPLING, max_new_tokens=_tokens(content, 5), stop_token_ids=())


def test_a_tool_episode_has_its_turns_and_what_tools_say_is_not_trained() -> None:
    source = tool_episodes(
        turns=3, median=5, sigma=0.5, longest=9, tool_median_s=1e-3, tool_sigma=0.0, tool_longest_s=1e-3, tool_tokens=4
    )
    policy = Echo()
    episode = asyncio.run(tool_episode(task(source[0]), policy))
    assert len(policy.asked) == 3
    assert len(episode.token_ids) == 16 + 2 * 4 + int(episode.loss_mask.sum())


def test_the_reward_tells_answers_apart() -> None:
    assert even_share([1, 2, 4, 5]) == 0.5
    assert even_share([]) == 0.0


def test_a_distribution_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="shortest <= median <= longest"):
        LogNormal(10, 1.0, 1, 5)


def _tokens(content: Any, sample: int) -> int:
    return round(content["tokens"].at("tokens", *content["key"], sample, 0))
