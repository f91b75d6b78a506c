"""What the engine sampled is what is trained: columns, spans and refusals of episodes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_async.actors.episode import EpisodeBuilder
from slime_async.actors.turn import Turn, merge_spans
from slime_async.trajectory import NOT_SAMPLED, TaskRef, VersionSpan
from tests.actors.scripted import weights

REF = TaskRef(serial=9, source="s", index=4)


@dataclass
class Token:
    """One token as the property test keeps it: a row where the implementation has columns."""

    id: int
    version: int = NOT_SAMPLED
    logprob: float = 0.0


sampled = st.builds(Token, st.integers(0, 99), st.integers(0, 3), st.integers(-64, 0).map(lambda n: n / 8))
given_token = st.builds(Token, st.integers(0, 99))
turns = st.lists(st.tuples(st.lists(given_token, max_size=5), st.lists(sampled, min_size=1, max_size=6)), min_size=1)


def spans_of(tokens: list[Token], *, redundant: bool) -> tuple[VersionSpan, ...]:
    """One span per token, or only where the version changes: both mean the same."""
    spans = [VersionSpan(i, weights(token.version)) for i, token in enumerate(tokens)]
    return tuple(spans) if redundant else merge_spans(spans)


@given(turns, st.booleans())
def test_a_trajectory_holds_exactly_the_tokens_that_were_given_and_sampled(
    script: list[tuple[list[Token], list[Token]]], redundant: bool
) -> None:
    rows: list[Token] = []
    builder = EpisodeBuilder()
    for inserted, output in script:
        prompt = builder.token_ids + [token.id for token in inserted]
        ids, logprobs = [token.id for token in output], [token.logprob for token in output]
        builder.add(Turn(prompt, ids, logprobs, spans_of(output, redundant=redundant), "stop"))
        rows += inserted + output

    trajectory = builder.finish(0.5).to_trajectory(REF, sample=3, attempt=1)

    assert trajectory.token_ids.tolist() == [row.id for row in rows]
    assert trajectory.loss_mask.tolist() == [int(row.version != NOT_SAMPLED) for row in rows]
    assert trajectory.behavior_logprobs.tolist() == [row.logprob for row in rows]
    assert trajectory.token_versions().tolist() == [row.version for row in rows]
    assert (trajectory.token_ids.dtype, trajectory.behavior_logprobs.dtype) == (np.int32, np.float32)
    named = [span.weights for span in trajectory.spans]
    assert all(a != b for a, b in itertools.pairwise(named)), "consecutive spans name different weights"


def test_a_trajectory_carries_the_reservation_and_the_environments_numbers() -> None:
    builder = EpisodeBuilder()
    builder.add(Turn([1], [2], [-1.0], (VersionSpan(0, weights(5)),), "length"))
    trajectory = builder.finish(1, metrics={"guesses": 3}).to_trajectory(REF, sample=2, attempt=1)
    assert (trajectory.key.task, trajectory.sample, trajectory.attempt) == (9, 2, 1)
    assert (trajectory.reward, trajectory.finish_reason, trajectory.metrics) == (1.0, "length", {"guesses": 3.0})


def test_an_environment_may_name_its_own_finish_reason() -> None:
    builder = EpisodeBuilder()
    builder.add(Turn([1], [2], [-1.0], (VersionSpan(0, weights(0)),), "stop"))
    assert builder.finish(0.0, finish_reason="out_of_guesses").finish_reason == "out_of_guesses"


def episode_of_three_tokens() -> EpisodeBuilder:
    builder = EpisodeBuilder()
    builder.add(Turn([1, 2], [3], [-1.0], (VersionSpan(0, weights(0)),), "stop"))
    return builder


def turn_after(prompt: list[int]) -> Turn:
    return Turn(prompt, [9], [-1.0], (VersionSpan(0, weights(0)),), "stop")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, 7, 3, 4], "token 7 at position 1, where the episode has 2"),
        ([1, 2, 4], "token 4 at position 2, where the episode has 3"),
        ([1, 2], "ends at position 2, but the episode already has 3 tokens"),
    ],
)
def test_a_prompt_that_departs_from_the_episode_is_refused_at_its_first_difference(
    prompt: list[int], message: str
) -> None:
    builder = episode_of_three_tokens()
    with pytest.raises(ValueError, match=message):
        builder.add(turn_after(prompt))
    assert builder.token_ids == [1, 2, 3], "a refused turn leaves no trace"


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match="reward is"):
        episode_of_three_tokens().finish(reward)


def test_an_episode_without_a_sampled_token_is_refused() -> None:
    with pytest.raises(ValueError, match="sampled no token"):
        EpisodeBuilder().finish(1.0)


@pytest.mark.parametrize(
    ("logprobs", "starts", "message"),
    [
        ([-1.0], [0], "1 log-probabilities for 2 sampled tokens"),
        ([-1.0, -1.0], [], "must start at 0"),
        ([-1.0, -1.0], [1], "must start at 0"),
        ([-1.0, -1.0], [0, 2], "lie within 2 tokens"),
    ],
)
def test_a_turn_whose_columns_do_not_fit_is_refused(logprobs: list[float], starts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Turn([1], [2, 3], logprobs, tuple(VersionSpan(s, weights(s)) for s in starts), "stop")
