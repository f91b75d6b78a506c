"""Who gets credit for what: advantages of episodes with several branches, roles or rewards per turn.

Each *share* of an episode has a return; shares are compared within *cells*, as trajectories are within groups:

    task.credit = "episode"   one share per branch: everything that it, or the whole episode, earned
                              cell: (group, role)
    task.credit = "to-go"     one share per turn: what its branch earned from this turn on
                              cell: (group, role, how many turns came before)

Samples may have any number of branches and turns, so cells differ in size. A share that has nobody to be compared with
has advantage 0 (baselines within groups), or the batch's mean as its baseline (REINFORCE++).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime_async.branches import Branch, branches, turn_rewards
from slime_async.config import Config
from slime_async.correction.advantages import grpo, grpo_without_std, leave_one_out, reinforce_plus_plus
from slime_async.trajectory import Trajectory

WITHIN_CELLS: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": grpo,
    "grpo-no-std": grpo_without_std,
    "rloo": leave_one_out,
    "reinforce++-baseline": grpo_without_std,
}
"""What ``algorithm.advantage`` does to the returns [1, n] of one cell"""
OVER_THE_BATCH = ("reinforce++", "reinforce++-baseline")
"""Normalised once more over all shares"""


@dataclass(frozen=True, slots=True)
class _Share:
    cell: Hashable
    tokens: slice
    """Of the branch"""
    earned: float


def branch_advantages(
    config: Config, trajectories: Sequence[Trajectory]
) -> list[list[tuple[Branch, NDArray[np.float32]]]]:
    """For each trajectory its branches, each with one advantage per token (0 where none was sampled)."""
    split = [[(branch, _shares(config, owner, branch)) for branch in branches(owner)] for owner in trajectories]
    values = iter(_compare(config, [share for parts in split for _, shares in parts for share in shares]))
    return [[(branch, _spread(branch, shares, values)) for branch, shares in parts] for parts in split]


def rewards_of_tokens(trajectory: Trajectory) -> NDArray[np.float32]:
    """[T], what each token earned: a turn's reward at its end, the final one at its branch's last sampled token."""
    column = turn_rewards(trajectory).copy()
    for branch in branches(trajectory):
        sampled = np.flatnonzero(trajectory.loss_mask[branch.tokens])
        if sampled.size:
            column[branch.start + sampled[-1]] += branch.final_reward
    return column


def _shares(config: Config, trajectory: Trajectory, branch: Branch) -> list[_Share]:
    group = trajectory.task.serial
    rewards = turn_rewards(trajectory)[branch.tokens].astype(np.float64)
    if config.task.credit == "episode":
        earned = branch.final_reward + float(rewards.sum()) if branch.own_reward else trajectory.reward
        return [_Share((group, branch.role), slice(0, branch.end - branch.start), earned)]
    turns = _turns(trajectory.loss_mask[branch.tokens], rewards)
    return [
        _Share((group, branch.role, k), turn, branch.final_reward + float(rewards[turn.start :].sum()))
        for k, turn in enumerate(turns)
    ]


def _turns(loss_mask: NDArray[np.uint8], rewards: NDArray[np.float64]) -> list[slice]:
    """Runs of sampled tokens, each ending where the next token was given or a reward was earned."""
    sampled = np.concatenate([[0], loss_mask != 0, [0]]).astype(np.int8)
    begins, ends = np.flatnonzero(np.diff(sampled) == 1), np.flatnonzero(np.diff(sampled) == -1)
    turns = []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        cuts = [begin + int(i) + 1 for i in np.flatnonzero(rewards[begin : end - 1])]
        edges = [begin, *cuts, end]
        turns += [slice(a, b) for a, b in itertools.pairwise(edges)]
    return turns


def _compare(config: Config, shares: Sequence[_Share]) -> list[float]:
    """The advantage of each share's return, by ``algorithm.advantage``."""
    kind = config.algorithm.advantage
    values = torch.tensor([share.earned for share in shares], dtype=torch.float64)
    within = WITHIN_CELLS.get(kind)
    if within is not None:
        cells = defaultdict(list)
        for i, share in enumerate(shares):
            cells[share.cell].append(i)
        for members in cells.values():
            row = values[members].unsqueeze(0)
            values[members] = (within(row) if len(members) > 1 else torch.zeros_like(row)).squeeze(0)
    if kind in OVER_THE_BATCH:
        values = reinforce_plus_plus(values)
    return [float(value) for value in values]


def _spread(branch: Branch, shares: Sequence[_Share], values: Iterator[float]) -> NDArray[np.float32]:
    column = np.zeros(branch.end - branch.start, dtype=np.float32)
    for share in shares:
        column[share.tokens] = next(values)
    return column
