"""Advantages where there is a critic: GAE and V-trace, over packed sequences.

For learners that train a value head; the group estimators of ``advantages.py`` need none. Time runs over sampled tokens
alone: what a tool wrote between two of them is part of the state, not an action. Sequences must be contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slime_async.correction.ratios import Sequences, ratio, upcast


class CriticEstimate(NamedTuple):
    """Both [T], 0 outside the mask, without gradient."""

    advantages: Tensor
    value_targets: Tensor
    """What the critic should have said"""


@torch.no_grad()
def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    sequences: Sequences,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> CriticEstimate:
    """A_t = δ_t + γλ·A_{t+1}, δ_t = R_t + γ·V_{t+1} − V_t. Source: arXiv 1506.02438.

    ``token_rewards`` and ``values`` are [T]; ``bootstrap`` [S] is the value after the last sampled token, 0 when not
    given, which says that every episode ended rather than was cut.
    """
    time = _Time.of(mask, sequences)
    rewards, v = time.dense(token_rewards), time.dense(values)
    following = time.following(v, bootstrap)
    delta = rewards + gamma * following - v
    advantages = time.packed(_sum_from_right(delta, torch.full_like(delta, gamma * lam)))
    return CriticEstimate(advantages, (advantages + upcast(values)).masked_fill(mask == 0, 0.0))


@torch.no_grad()
def vtrace(
    log_current_over_behavior: Tensor,
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    sequences: Sequences,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    bootstrap: Tensor | None = None,
) -> CriticEstimate:
    """Off-policy targets v_t and the advantages of their policy gradient; pair them with ``objectives.reinforce``.

    r = π_θ/μ, ρ_t = min(r_t, rho_max), c_t = λ·min(r_t, c_max)::

        v_t = V_t + ρ_t·(R_t + γ·V_{t+1} − V_t) + γ·c_t·(v_{t+1} − V_{t+1})
        A_t = ρ_t·(R_t + γ·v_{t+1} − V_t)

    On-policy v_t is the λ-return. rho_max bounds what is learnt (the value of a policy between μ and π_θ), c_max only
    how fast. Source: arXiv 1802.01561 (IMPALA). The weight ρ is inside A: use no other weight with it.
    """
    time = _Time.of(mask, sequences)
    rewards, v = time.dense(token_rewards), time.dense(values)
    r = ratio(time.dense(log_current_over_behavior))
    rho, c = r.clamp(max=rho_max), lam * r.clamp(max=c_max)
    following = time.following(v, bootstrap)
    correction = _sum_from_right(rho * (rewards + gamma * following - v) * time.occupied, gamma * c)
    targets = v + correction
    advantages = rho * (rewards + gamma * time.following(targets, bootstrap) - v)
    return CriticEstimate(time.packed(advantages), time.packed(targets))


class ValueLoss(NamedTuple):
    """Both [T]."""

    loss: Tensor
    clipped: Tensor
    """1 where the clip took the gradient away"""


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float | None) -> ValueLoss:
    """½ max((V − R)², (V' − R)²), V' being V held within ±``clip`` of its old value: what implementations of PPO
    (arXiv 1707.06347) pair with its clipped objective."""
    error = (values - targets).square()
    if clip is None:
        return ValueLoss(0.5 * error, torch.zeros_like(error))
    near = old_values + (values - old_values).clamp(-clip, clip)
    bounded = (near - targets).square()
    return ValueLoss(0.5 * torch.maximum(error, bounded), ((bounded > error) & (near != values)).to(error.dtype))


class _Time(NamedTuple):
    """Sampled tokens as [S, L], left-aligned: L is the longest sequence's count of them."""

    sampled: Tensor
    """[T] bool"""
    row: Tensor
    column: Tensor
    occupied: Tensor
    """[S, L], 1 where a token is"""
    last: Tensor
    """[S], how many tokens each row has"""

    @classmethod
    def of(cls, mask: Tensor, sequences: Sequences) -> _Time:
        sampled = mask > 0
        counts = sequences.sum(sampled.long())
        before = counts.cumsum(0) - counts
        row = sequences.ids[sampled]
        column = torch.arange(len(row), device=row.device) - before[row]
        longest = int(counts.max()) if len(counts) else 0
        occupied = torch.arange(longest, device=mask.device) < counts[:, None]
        return cls(sampled, row, column, occupied.to(upcast(mask).dtype), counts)

    def dense(self, column: Tensor) -> Tensor:
        """[T] → [S, L], 0 where no token is."""
        column = upcast(column)
        table = column.new_zeros(self.occupied.shape)
        table[self.row, self.column] = column[self.sampled]
        return table

    def packed(self, table: Tensor) -> Tensor:
        """[S, L] → [T], 0 outside the mask."""
        column = table.new_zeros(self.sampled.shape)
        column[self.sampled] = table[self.row, self.column]
        return column

    def following(self, table: Tensor, bootstrap: Tensor | None) -> Tensor:
        """The next token's entry; after the last one ``bootstrap``, or 0."""
        shifted = torch.cat([table[:, 1:], table.new_zeros(len(table), 1)], dim=1) if table.shape[1] else table.clone()
        if bootstrap is not None:
            present = self.last > 0
            shifted[present, self.last[present] - 1] = bootstrap.to(table.dtype)[present]
        return shifted


def _sum_from_right(delta: Tensor, decay: Tensor) -> Tensor:
    """x_t = delta_t + decay_t·x_{t+1} along the last axis; one step per column, all rows at once."""
    total = torch.zeros_like(delta)
    running = delta.new_zeros(delta.shape[0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + decay[:, t] * running
        total[:, t] = running
    return total
