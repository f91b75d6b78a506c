"""Whether an episode is what the engine sampled, and whether two of them are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slime_async.actors.probe import SampledToken
from slime_async.branches import branches
from slime_async.trajectory import Trajectory

Exchange = tuple[tuple[int, ...], tuple[SampledToken, ...]]
"""A request's prompt and what was sampled after it"""


def compare_with_engine(trajectory: Trajectory, exchanges: Sequence[Exchange]) -> tuple[list[str], int]:
    """What differs, and how many answers of the engine are not trained.

    Every run of trained tokens must be an answer that the engine gave to exactly the tokens before it.
    """
    unused: dict[tuple[int, ...], list[tuple[SampledToken, ...]]] = {}
    for prompt, sampled in exchanges:
        if sampled:
            unused.setdefault(prompt, []).append(sampled)
    problems = []
    versions = trajectory.token_versions()
    for number, branch in enumerate(branches(trajectory)):
        tokens = trajectory.token_ids[branch.tokens].tolist()
        columns = zip(
            tokens,
            trajectory.behavior_logprobs[branch.tokens].tolist(),
            versions[branch.tokens].tolist(),
            strict=True,
        )
        rows = [SampledToken(*row) for row in columns]
        problem = _follow(rows, trajectory.loss_mask[branch.tokens].tolist(), unused)
        if problem:
            problems.append(f"branch {number}: {problem}")
    return problems, sum(len(answers) for answers in unused.values())


def _follow(
    rows: Sequence[SampledToken], mask: Sequence[int], unused: dict[tuple[int, ...], list[tuple[SampledToken, ...]]]
) -> str:
    """Walk along one branch and use up the answers it consists of; the first problem, or nothing."""
    position = 0
    while position < len(rows):
        if not mask[position]:
            position += 1
            continue
        prompt = tuple(row.token_id for row in rows[:position])
        answers = unused.get(prompt, [])
        fitting = [a for a in answers if list(a) == list(rows[position : position + len(a)])]
        if not fitting:
            return _explain(rows, position, answers)
        answer = max(fitting, key=len)
        answers.remove(answer)
        position += len(answer)
    return ""


def _explain(rows: Sequence[SampledToken], position: int, answers: Sequence[tuple[SampledToken, ...]]) -> str:
    if not answers:
        return (
            f"the tokens trained from position {position} on were not sampled by the engine after the {position} "
            "before them, or are trained twice: build prompts from episode.token_ids, and add each turn once"
        )
    for offset, wanted in enumerate(answers[0]):
        if position + offset >= len(rows) or rows[position + offset] != wanted:
            has = rows[position + offset] if position + offset < len(rows) else "nothing"
            return f"position {position + offset} holds {has}, but the engine sampled {wanted}"
    return f"the answer at position {position} is cut or changed"


def compare_trajectories(first: Trajectory, again: Trajectory) -> list[str]:
    """What differs between two plays of the same sample, with the same engine."""
    differences = [
        f"{name} differs: the episode depends on something besides its task and the policy's answers (shared state, "
        "the clock, an unseeded random number)"
        for name in ("token_ids", "loss_mask")
        if not np.array_equal(getattr(first, name), getattr(again, name))
    ]
    if not differences and first.reward != again.reward:
        differences.append(f"the same answers earned {first.reward} and {again.reward}")
    if not differences and first.finish_reason != again.finish_reason:
        differences.append(f"the same answers ended with {first.finish_reason!r} and {again.finish_reason!r}")
    return differences
