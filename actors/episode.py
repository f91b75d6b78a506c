"""Episodes, token by token: what was given to the policy and what it sampled.

What the engine sampled is what is trained; nothing is ever decoded and tokenised again. Each turn's prompt must extend
all tokens of its branch before it, and the tokens that the environment put between two answers are not trained:

    turn 1     prompt [ a b c ]              sampled [ d e ]
    turn 2     prompt [ a b c d e f g ]      sampled [ h ]

    token_ids         [ a b c | d e | f g | h ]
    loss_mask         [ 0 0 0 | 1 1 | 0 0 | 1 ]

An episode is a tree. ``fork`` begins a branch with the tokens so far, as context; ``branch`` begins one from nothing,
perhaps for another role. A sampled token is trained once, in the branch that sampled it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slime_async import branches
from slime_async.actors.turn import Turn, merge_spans, shift_spans
from slime_async.routing import ROUTED_EXPERTS, Routes, lay_out
from slime_async.trajectory import TaskRef, Trajectory, VersionSpan


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A finished episode of T tokens; ``EpisodeBuilder.finish`` makes it. Columns are ``Trajectory``'s."""

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behavior_logprobs: NDArray[np.float32]
    spans: tuple[VersionSpan, ...]
    reward: float
    """The return: the final reward and every turn's"""
    finish_reason: str
    metrics: dict[str, float] = field(default_factory=dict)
    extras: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Branches, where there are several (``slime_async.branches``); routed experts, where the engine recorded them"""

    def to_trajectory(self, task: TaskRef, sample: int, attempt: int) -> Trajectory:
        """The episode as the learner gets it."""
        return Trajectory(
            task=task,
            sample=sample,
            attempt=attempt,
            token_ids=self.token_ids,
            loss_mask=self.loss_mask,
            behavior_logprobs=self.behavior_logprobs,
            spans=self.spans,
            reward=self.reward,
            finish_reason=self.finish_reason,
            metrics=self.metrics,
            extras=self.extras,
        )


class BranchBuilder:
    """Collects the turns of one branch.

    The next prompt is ``branch.token_ids`` followed by the environment's own tokens.
    """

    def __init__(self, root: EpisodeBuilder | None, role: str, context: Sequence[int]) -> None:
        self.role = role
        self.reward: float | None = None
        """What this branch earned at its end; the episode's final reward when left at None"""
        self._root = root
        # nine bytes per token: thousands of episodes wait at once, each with its whole history
        self._token_ids = array("i", context)
        self._loss_mask = bytearray(len(context))
        self._logprobs = array("f", bytes(4 * len(context)))
        self._spans: list[VersionSpan] = []
        self._turn_rewards: dict[int, float] = {}
        """By position of the turn's last token"""
        self._routes: list[tuple[int, Routes]] = []
        """Each turn's, by the position after its last token"""

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, given and sampled (a copy)."""
        return self._token_ids.tolist()

    @property
    def sampled_tokens(self) -> int:
        """Of this branch, that train"""
        return sum(self._loss_mask)

    def add(self, turn: Turn, reward: float = 0.0, *, trained: bool = True) -> None:
        """Append one turn, and what it earned on the spot.

        With ``trained`` False it is context: an answer of some other policy. Raises ``ValueError`` where the prompt
        departs from the tokens before it, and for a reward that is not finite or has no sampled token to go to.
        """
        if not math.isfinite(reward) or (reward and not (trained and turn.output_ids)):
            raise ValueError(f"a turn's reward is {reward}: it must be finite, and the turn must have trained tokens")
        self.check_extends(turn.prompt_ids)
        inserted = turn.prompt_ids[len(self._token_ids) :]
        start = len(turn.prompt_ids)
        n = len(turn.output_ids)
        self._token_ids.extend([*inserted, *turn.output_ids])
        self._loss_mask += bytes(len(inserted)) + bytes([trained]) * n
        self._logprobs.extend([0.0] * len(inserted) + (list(turn.logprobs) if trained else [0.0] * n))
        if trained and n:
            self._spans += shift_spans(turn.spans, start)
        if turn.routed_experts is not None:
            self._routes.append((start + n, turn.routed_experts))
        if reward:
            self._turn_rewards[start + n - 1] = reward
        self._top.last_turn_ended(turn.finish_reason)

    def fork(self, role: str | None = None) -> BranchBuilder:
        """A branch that goes on from the tokens so far; they are context there, whoever sampled them."""
        fork = BranchBuilder(self._top, self.role if role is None else role, self._token_ids)
        fork._routes += self._routes
        return self._top.begin(fork)

    def branch(self, role: str = "") -> BranchBuilder:
        """A branch that begins from nothing: another role's view, or a history that was rewritten."""
        return self._top.begin(BranchBuilder(self._top, role, ()))

    def continues(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a turn with this prompt can be added here."""
        return array("i", prompt_ids[: len(self._token_ids)]) == self._token_ids

    def check_extends(self, prompt_ids: Sequence[int]) -> None:
        """Raises ``ValueError`` at the first position where a prompt departs from this branch."""
        if self.continues(prompt_ids):
            return
        known = self._token_ids
        for position, (before, now) in enumerate(zip(known, prompt_ids, strict=False)):
            if before != now:
                raise ValueError(
                    f"the prompt of this turn has token {now} at position {position}, where the episode has {before}: "
                    "build it as builder.token_ids plus new tokens, never by tokenising the conversation again"
                )
        raise ValueError(
            f"the prompt of this turn ends at position {len(prompt_ids)}, but the episode already has "
            f"{len(known)} tokens: a prompt must contain everything before it"
        )

    @property
    def _top(self) -> EpisodeBuilder:
        assert self._root is not None
        return self._root


class EpisodeBuilder(BranchBuilder):
    """The first branch of an episode, and the record of all of them."""

    def __init__(self, role: str = "") -> None:
        super().__init__(None, role, ())
        self._root = self
        self._branches: list[BranchBuilder] = [self]
        self._finish_reason = ""

    def begin(self, branch: BranchBuilder) -> BranchBuilder:
        """Take a new branch into the episode; ``fork`` and ``branch`` do so."""
        self._branches.append(branch)
        return branch

    def last_turn_ended(self, finish_reason: str) -> None:
        """Remember how the latest turn of any branch ended."""
        self._finish_reason = finish_reason

    def finish(
        self, reward: float = 0.0, *, finish_reason: str | None = None, metrics: Mapping[str, float] | None = None
    ) -> Episode:
        """End the episode with its final reward; ``finish_reason`` is the last turn's unless the environment has its
        own. Branches in which nothing was sampled are left out.

        Raises ``ValueError`` when no token was sampled, a reward is not finite, or two roles share a number.
        """
        kept = [branch for branch in self._branches if branch.sampled_tokens]
        if not kept:
            raise ValueError("an episode in which the policy sampled no token cannot be trained: add() a turn first")
        for given in (reward, *(branch.reward for branch in kept)):
            if given is not None and not math.isfinite(given):
                raise ValueError(f"reward is {given}: it must be a finite number")
        starts = np.cumsum([0, *(len(branch._token_ids) for branch in kept)])[:-1]
        spans = [span for branch, start in zip(kept, starts, strict=True) for span in shift_spans(branch._spans, start)]
        token_rewards = {
            int(start) + position: value
            for branch, start in zip(kept, starts, strict=True)
            for position, value in branch._turn_rewards.items()
        }
        token_ids = np.concatenate([np.asarray(branch._token_ids, dtype=np.int32) for branch in kept])
        extras, earned = _extras(kept, starts, token_rewards, len(token_ids))
        records = [
            (int(start) + end, rows) for branch, start in zip(kept, starts, strict=True) for end, rows in branch._routes
        ]
        if (routes := lay_out(records, len(token_ids))) is not None:
            extras[ROUTED_EXPERTS] = routes
        return Episode(
            token_ids=token_ids,
            loss_mask=np.concatenate([np.frombuffer(branch._loss_mask, dtype=np.uint8) for branch in kept]),
            behavior_logprobs=np.concatenate([np.asarray(branch._logprobs, dtype=np.float32) for branch in kept]),
            spans=merge_spans(VersionSpan(int(first), weights) for first, weights in spans),
            reward=float(reward) + earned,
            finish_reason=finish_reason or self._finish_reason,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            extras=extras,
        )


def _extras(
    kept: Sequence[BranchBuilder], starts: NDArray[np.int64], token_rewards: Mapping[int, float], num_tokens: int
) -> tuple[dict[str, NDArray[Any]], float]:
    """The optional columns, only those that say something; and the sum of the turns' rewards, as fp32 holds them."""
    extras: dict[str, NDArray[Any]] = {}
    roles = {branch.role: branches.role_id(branch.role) for branch in kept}
    if len(set(roles.values())) != len(roles):
        raise ValueError(f"roles {sorted(roles)} share a number: rename one of them")
    if len(kept) > 1 or any(branch.role or branch.reward is not None for branch in kept):
        rewards = [math.nan if branch.reward is None else branch.reward for branch in kept]
        extras[branches.STARTS] = starts.astype(np.int32)
        extras[branches.ROLES] = np.array([roles[branch.role] for branch in kept], dtype=np.int64)
        extras[branches.REWARDS] = np.array(rewards, dtype=np.float32)
    if not token_rewards:
        return extras, 0.0
    column = np.zeros(num_tokens, dtype=np.float32)
    for position, value in token_rewards.items():
        column[position] = value
    extras[branches.TOKEN_REWARDS] = column
    return extras, float(column.sum(dtype=np.float64))
