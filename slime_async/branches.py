"""Branches: the sequences of one episode, laid one after the other in one trajectory.

An episode that is one growing conversation is one branch, and needs none of this. Where an agent rewrites its history,
explores alternatives, or plays several roles, its trajectory's columns are those of all branches in a row, and four
optional columns (``Trajectory.extras``) say where each begins and what it earned::

    token_ids        [ a b c D E | a b c D f G | p q R ]     capitals: sampled there, loss mask 1
    branch_starts    [ 0           5             11    ]
    branch_roles     [ 0           0             crc32 of "critic" ]
    branch_rewards   [ nan         0.5           1.0   ]     nan: the episode's final reward
    token_rewards    [ 0 0 0 0 .25 | 0 …                ]     per turn, at the last token of the turn that earned it

A branch is a sequence of its own for the learner: nothing attends across. D was sampled once and is trained once, in
the branch that sampled it; in the second it is context.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slime_async.trajectory import Trajectory

STARTS = "branch_starts"
"""int32 [K], ascending from 0"""
ROLES = "branch_roles"
"""int64 [K]"""
REWARDS = "branch_rewards"
"""float32 [K], NaN where the episode's final reward counts"""
TOKEN_REWARDS = "token_rewards"
"""float32 [T]"""

NO_ROLE = 0


@dataclass(frozen=True, slots=True)
class Branch:
    """One sequence of a trajectory: tokens ``[start, end)``."""

    start: int
    end: int
    role: int
    """``role_id`` of its role's name; branches are compared with those of the same role"""
    final_reward: float
    """Earned at its end, besides what its turns earned"""
    own_reward: bool
    """Its final reward is its own, not the episode's"""

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.end)


def role_id(role: str) -> int:
    """The number that stands for a role's name in every process; ``NO_ROLE`` for the empty name."""
    return zlib.crc32(role.encode()) if role else NO_ROLE


def is_plain(trajectory: Trajectory) -> bool:
    """One branch, one final reward: nothing in here applies."""
    return STARTS not in trajectory.extras and TOKEN_REWARDS not in trajectory.extras


def turn_rewards(trajectory: Trajectory) -> NDArray[np.float32]:
    """[T], what each turn earned, at its last token."""
    rewards = trajectory.extras.get(TOKEN_REWARDS)
    n = len(trajectory.token_ids)
    if rewards is None:
        return np.zeros(n, dtype=np.float32)
    if len(rewards) != n or not np.isfinite(rewards).all():
        raise ValueError(f"{TOKEN_REWARDS} has {len(rewards)} entries for {n} tokens: one finite number per token")
    return np.asarray(rewards, dtype=np.float32)


def branches(trajectory: Trajectory) -> tuple[Branch, ...]:
    """All branches, in order. Raises ``ValueError`` when the columns contradict each other."""
    n = len(trajectory.token_ids)
    starts = [int(start) for start in trajectory.extras.get(STARTS, np.zeros(1, dtype=np.int32))]
    count = len(starts)
    roles = trajectory.extras.get(ROLES, np.zeros(count, dtype=np.int64))
    rewards = trajectory.extras.get(REWARDS, np.full(count, np.nan, dtype=np.float32))
    if starts[:1] != [0] or starts != sorted(set(starts)) or starts[-1] >= n:
        raise ValueError(f"branches start at {starts}: must start at 0, ascend and lie within {n} tokens")
    if not len(roles) == len(rewards) == count:
        raise ValueError(f"{count} branches have {len(roles)} roles and {len(rewards)} rewards: one each")
    final = trajectory.reward - float(turn_rewards(trajectory).sum(dtype=np.float64))
    ends = [*starts[1:], n]
    return tuple(
        Branch(start, end, int(role), final if np.isnan(reward) else float(reward), not np.isnan(reward))
        for start, end, role, reward in zip(starts, ends, roles, rewards, strict=True)
    )
