"""Branches of an episode against a recomputation that keeps one row per token; and who gets credit for what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime_async.actors.episode import BranchBuilder, EpisodeBuilder
from slime_async.actors.recorder import record
from slime_async.actors.turn import Turn
from slime_async.branches import NO_ROLE, branches, is_plain, role_id, turn_rewards
from slime_async.config import Config
from slime_async.learner.batch import prepare_batch
from slime_async.trajectory import NOT_SAMPLED, TaskRef, Trajectory, VersionSpan
from tests.actors.scripted import weights

ROLES = ("", "solver", "critic")


@dataclass
class Row:
    id: int
    version: int = NOT_SAMPLED
    logprob: float = 0.0
    reward: float = 0.0


@dataclass
class Line:
    """One branch as the recomputation keeps it."""

    role: str
    rows: list[Row] = field(default_factory=list)
    reward: float | None = None


eighths = st.integers(-8, 8).map(lambda n: n / 8)
answers = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), eighths), min_size=1, max_size=4)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("turn"),
            st.integers(0, 5),
            st.lists(st.integers(0, 9), max_size=3),
            answers,
            st.one_of(st.just(0.0), eighths),
            st.booleans(),
        ),
        st.tuples(st.just("fork"), st.integers(0, 5)),
        st.tuples(st.just("branch"), st.sampled_from(ROLES)),
        st.tuples(st.just("reward"), st.integers(0, 5), eighths),
    ),
    min_size=1,
    max_size=12,
)


def play(script: list[tuple[Any, ...]]) -> tuple[EpisodeBuilder, list[Line]]:
    """The same operations on a builder and on rows."""
    root = EpisodeBuilder()
    built: list[BranchBuilder] = [root]
    lines = [Line("")]
    for operation in script:
        match operation:
            case ("turn", at, inserted, output, reward, trained):
                builder, line = built[at % len(built)], lines[at % len(lines)]
                reward = reward if trained else 0.0
                spans = tuple(VersionSpan(i, weights(version)) for i, (_, version, _) in enumerate(output))
                ids, logprobs = [token for token, _, _ in output], [logprob for _, _, logprob in output]
                turn = Turn(builder.token_ids + inserted, ids, logprobs, spans, "stop")
                builder.add(turn, reward, trained=trained)
                line.rows += [Row(token) for token in inserted]
                line.rows += [Row(token, version, lp) if trained else Row(token) for token, version, lp in output]
                line.rows[-1].reward = reward
            case ("fork", at):
                built.append(built[at % len(built)].fork())
                parent = lines[at % len(lines)]
                lines.append(Line(parent.role, [Row(row.id) for row in parent.rows]))
            case ("branch", role):
                built.append(root.branch(role))
                lines.append(Line(role))
            case ("reward", at, value):
                built[at % len(built)].reward = lines[at % len(lines)].reward = value
    return root, lines


@given(operations, eighths)
def test_every_sampled_token_trains_once_in_the_branch_that_sampled_it(
    script: list[tuple[Any, ...]], final: float
) -> None:
    builder, lines = play(script)
    kept = [line for line in lines if any(row.version != NOT_SAMPLED for row in line.rows)]
    if not kept:
        with pytest.raises(ValueError, match="sampled no token"):
            builder.finish(final)
        return
    trajectory = builder.finish(final).to_trajectory(TaskRef(3, "s", 0), sample=1, attempt=0)
    rows = [row for line in kept for row in line.rows]

    assert trajectory.token_ids.tolist() == [row.id for row in rows]
    assert trajectory.loss_mask.tolist() == [int(row.version != NOT_SAMPLED) for row in rows]
    assert trajectory.behavior_logprobs.tolist() == [row.logprob for row in rows]
    assert trajectory.token_versions().tolist() == [row.version for row in rows]
    assert turn_rewards(trajectory).tolist() == [row.reward for row in rows]
    assert trajectory.reward == pytest.approx(final + sum(row.reward for row in rows))
    found = branches(trajectory)
    assert [b.end - b.start for b in found] == [len(line.rows) for line in kept]
    assert [b.role for b in found] == [role_id(line.role) for line in kept]
    assert [b.final_reward for b in found] == pytest.approx([final if b.reward is None else b.reward for b in kept])
    assert sum(trajectory.loss_mask) == sum(row.version != NOT_SAMPLED for line in lines for row in line.rows)


@given(operations)
def test_one_branch_with_one_reward_costs_nothing_extra(script: list[tuple[Any, ...]]) -> None:
    builder, lines = play(
        [(*op[:4], 0.0, True) if op[0] == "turn" else ("turn", 0, [], [(1, 0, 0.0)], 0.0, True) for op in script]
    )
    assert len(lines) == 1
    assert builder.finish(1.0).extras == {}


def turn(prompt: list[int], *output: int, version: int = 0) -> Turn:
    return Turn(prompt, list(output), [-0.5] * len(output), (VersionSpan(0, weights(version)),), "stop")


def test_turns_alone_find_their_branches_by_their_prompts() -> None:
    history = [turn([1, 2], 3), turn([1, 2, 3, 4], 5), turn([1, 9], 6), turn([1, 2, 3, 4, 5, 7], 8), turn([1, 9, 6], 2)]
    trajectory = record(history).finish(1.0).to_trajectory(TaskRef(0, "s", 0), 0, 0)
    assert [trajectory.token_ids[b.tokens].tolist() for b in branches(trajectory)] == [
        [1, 2, 3, 4, 5, 7, 8],
        [1, 9, 6, 2],
    ]
    assert trajectory.loss_mask.tolist() == [0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 1]


def test_names_of_roles_that_share_a_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime_async.branches.role_id", lambda role: len(role))
    builder = EpisodeBuilder("ab")
    builder.add(turn([1], 2))
    builder.branch("cd").add(turn([1], 2))
    with pytest.raises(ValueError, match=r"roles \['ab', 'cd'\] share a number"):
        builder.finish()


def test_columns_that_contradict_each_other_are_refused() -> None:
    builder = EpisodeBuilder()
    builder.add(turn([1], 2))
    builder.branch().add(turn([1], 2))
    whole = builder.finish().to_trajectory(TaskRef(0, "s", 0), 0, 0)
    for name, column, message in (
        ("branch_starts", [0, 4], "lie within 4 tokens"),
        ("branch_starts", [1, 2], "must start at 0"),
        ("branch_roles", [0], "have 1 roles"),
        ("token_rewards", [0.0], "1 entries for 4 tokens"),
    ):
        broken = replace(whole, extras=whole.extras | {name: np.array(column)})
        with pytest.raises(ValueError, match=message):
            branches(broken)


# --------------------------------------------------------------------------------------------------------- credit


def make_config(credit: str = "episode", advantage: str = "grpo-no-std", **task: Any) -> Config:
    table = {"batch": {"group_size": 2, "groups": 1}, "algorithm": {"advantage": advantage}}
    return Config.model_validate(table | {"task": {"credit": credit, **task}})


def finished(builder: EpisodeBuilder, sample: int, reward: float, **how: Any) -> Trajectory:
    return builder.finish(reward, **how).to_trajectory(TaskRef(7, "s", 0), sample, 0)


def two_turns(sample: int, first: float, second: float, final: float) -> Trajectory:
    builder = EpisodeBuilder()
    builder.add(turn([1], 2, 3), first)
    builder.add(turn([1, 2, 3, 4], 5), second)
    return finished(builder, sample, final)


def advantages(config: Config, *trajectories: Trajectory) -> list[list[float]]:
    prepared = prepare_batch(trajectories, 0, config)
    return [np.broadcast_to(s.advantages, s.token_ids.shape).tolist() for s in prepared.sequences]


def test_rewards_per_turn_add_up_to_the_return_of_the_episode() -> None:
    pair = two_turns(0, 1.0, 0.0, 1.0), two_turns(1, 0.0, 0.5, 0.0)
    assert [t.reward for t in pair] == [2.0, 0.5]
    assert advantages(make_config(), *pair) == [[0.75] * 5, [-0.75] * 5]


def test_reward_to_go_compares_turns_with_the_same_turn_of_other_samples() -> None:
    pair = two_turns(0, 1.0, 0.0, 1.0), two_turns(1, 0.0, 0.5, 0.0)
    # returns to go: (2, 1) and (0.5, 0.5)
    assert advantages(make_config("to-go"), *pair) == [[0, 0.75, 0.75, 0, 0.25], [0, -0.75, -0.75, 0, -0.25]]


def test_roles_are_compared_with_their_own_kind() -> None:
    def duel(sample: int, white: float, black: float) -> Trajectory:
        builder = EpisodeBuilder("white")
        builder.reward = white
        builder.add(turn([1], 2))
        other = builder.branch("black")
        other.reward = black
        other.add(turn([5], 6))
        return finished(builder, sample, 0.0)

    assert advantages(make_config(), duel(0, 1.0, -1.0), duel(1, -1.0, 1.0)) == [[1, 1], [-1, -1], [-1, -1], [1, 1]]


def test_a_branch_that_no_other_sample_has_gets_no_gradient_from_groups() -> None:
    lone = EpisodeBuilder()
    lone.add(turn([1], 2))
    lone.branch("critic").add(turn([5], 6))
    plain = EpisodeBuilder()
    plain.add(turn([1], 2))
    assert advantages(make_config(), finished(lone, 0, 1.0), finished(plain, 1, 0.0)) == [
        [0.5] * 2,
        [0] * 2,
        [-0.5] * 2,
    ]


@pytest.mark.parametrize("advantage", ["grpo", "grpo-no-std", "rloo", "reinforce++", "reinforce++-baseline"])
def test_every_estimator_gives_one_branch_per_sample_what_it_gives_a_plain_trajectory(advantage: str) -> None:
    def episode(sample: int, reward: float, role: str) -> Trajectory:
        builder = EpisodeBuilder(role)
        builder.add(turn([1], 2))
        return finished(builder, sample, reward)

    config = make_config(advantage=advantage)
    plain = [episode(0, 1.0, ""), episode(1, 0.25, "")]
    branched = [episode(0, 1.0, "solver"), episode(1, 0.25, "solver")]
    assert all(is_plain(t) for t in plain)
    assert not any(is_plain(t) for t in branched)
    wanted = advantages(config, *plain)
    assert np.allclose(advantages(config, *branched), wanted)


def test_truncated_episodes_may_keep_their_reward_and_lose_their_weight() -> None:
    def episode(sample: int, reason: str) -> Trajectory:
        builder = EpisodeBuilder()
        builder.add(turn([1], 2))
        return finished(builder, sample, float(sample), finish_reason=reason)

    pair = episode(0, "stop"), episode(1, "token_budget")
    masked = prepare_batch(pair, 0, make_config(on_truncated="mask"))
    assert [s.weight_mask.tolist() for s in masked.sequences] == [[0, 1], [0, 0]]
    assert [s.advantages for s in masked.sequences] == [-0.5, 0.5]
    assert masked.metrics["truncated_trajectories"] == 1
    trained = prepare_batch(pair, 0, make_config())
    assert [s.weight_mask.tolist() for s in trained.sequences] == [[0, 1], [0, 1]]


def test_no_role_has_a_number_of_its_own() -> None:
    assert role_id("") == NO_ROLE
    assert len({role_id(name) for name in ROLES}) == len(ROLES)
