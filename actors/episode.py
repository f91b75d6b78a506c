"""Episodes, token by token: what was given to the policy and what it sampled.

What the engine sampled is what is trained; nothing is ever decoded and tokenised again. Each turn's prompt must extend
all tokens before it, so an episode is one sequence, and the tokens that the environment put between two answers are
not trained:

    turn 1     prompt [ a b c ]              sampled [ d e ]
    turn 2     prompt [ a b c d e f g ]      sampled [ h ]

    token_ids         [ a b c | d e | f g | h ]
    loss_mask         [ 0 0 0 | 1 1 | 0 0 | 1 ]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slime_async.trajectory import TaskRef, Trajectory, VersionSpan


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of the policy; N tokens were sampled.

    Raises ``ValueError`` when log-probs or spans do not fit the tokens.
    """

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    """[N], the stop token included"""
    logprobs: Sequence[float]
    """[N], log μ"""
    spans: tuple[VersionSpan, ...]
    """Count from the first sampled token (0)"""
    finish_reason: str
    """``stop`` or ``length``"""

    def __post_init__(self) -> None:
        n = len(self.output_ids)
        if len(self.logprobs) != n:
            raise ValueError(f"{len(self.logprobs)} log-probabilities for {n} sampled tokens: there must be one each")
        starts = [span.first_token for span in self.spans]
        if n and (starts[:1] != [0] or starts != sorted(set(starts)) or starts[-1] >= n):
            raise ValueError(f"version spans start at {starts}: must start at 0, ascend and lie within {n} tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A finished episode of T tokens; ``EpisodeBuilder.finish`` makes it. Columns are ``Trajectory``'s."""

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    behavior_logprobs: NDArray[np.float32]
    spans: tuple[VersionSpan, ...]
    reward: float
    finish_reason: str
    metrics: dict[str, float] = field(default_factory=dict)

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
        )


class EpisodeBuilder:
    """Collects the turns of one episode.

    The next prompt of a multi-turn episode is ``builder.token_ids`` followed by the environment's own tokens.
    """

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._loss_mask: list[int] = []
        self._logprobs: list[float] = []
        self._spans: list[VersionSpan] = []
        self._finish_reason = ""

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, given and sampled (a copy)."""
        return list(self._token_ids)

    def add(self, turn: Turn) -> None:
        """Append one turn. Raises ``ValueError`` where its prompt departs from the tokens before it."""
        self._check_extends(turn.prompt_ids)
        inserted = turn.prompt_ids[len(self._token_ids) :]
        start = len(turn.prompt_ids)
        self._token_ids += [*inserted, *turn.output_ids]
        self._loss_mask += [0] * len(inserted) + [1] * len(turn.output_ids)
        self._logprobs += [0.0] * len(inserted) + list(turn.logprobs)
        self._spans += shift_spans(turn.spans, start) if turn.output_ids else ()
        self._finish_reason = turn.finish_reason

    def finish(
        self, reward: float, *, finish_reason: str | None = None, metrics: Mapping[str, float] | None = None
    ) -> Episode:
        """End the episode with its return; ``finish_reason`` is the last turn's unless the environment has its own.

        Raises ``ValueError`` when no token was sampled or the reward is not finite.
        """
        if not any(self._loss_mask):
            raise ValueError("an episode in which the policy sampled no token cannot be trained: add() a turn first")
        if not math.isfinite(reward):
            raise ValueError(f"reward is {reward}: it must be a finite number")
        return Episode(
            token_ids=np.asarray(self._token_ids, dtype=np.int32),
            loss_mask=np.asarray(self._loss_mask, dtype=np.uint8),
            behavior_logprobs=np.asarray(self._logprobs, dtype=np.float32),
            spans=merge_spans(self._spans),
            reward=float(reward),
            finish_reason=finish_reason or self._finish_reason,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
        )

    def _check_extends(self, prompt_ids: Sequence[int]) -> None:
        known = self._token_ids
        for position, (before, now) in enumerate(zip(known, prompt_ids, strict=False)):
            if before != now:
                raise ValueError(
                    f"the prompt of this turn has token {now} at position {position}, where the episode has {before}: "
                    "build it as builder.token_ids plus new tokens, never by tokenising the conversation again"
                )
        if len(prompt_ids) < len(known):
            raise ValueError(
                f"the prompt of this turn ends at position {len(prompt_ids)}, but the episode already has "
                f"{len(known)} tokens: a prompt must contain everything before it"
            )


def shift_spans(spans: Iterable[VersionSpan], offset: int) -> list[VersionSpan]:
    """The same spans, counted from ``offset`` tokens earlier."""
    return [VersionSpan(first + offset, weights) for first, weights in spans]


def merge_spans(spans: Iterable[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Drop each span that only continues the weights of the one before it."""
    merged: list[VersionSpan] = []
    for span in spans:
        if not merged or merged[-1].weights != span.weights:
            merged.append(span)
    return tuple(merged)
