"""Trajectories and the versions of the weights that produced them.

A trajectory is one episode, stored as columns: one array per quantity, one entry per token. Every sampled token
carries the log-probability the sampler gave it (μ, the behaviour policy) and the weights that produced it, as
*version spans*: position ``p`` belongs to the last span whose ``first_token`` is ≤ ``p``.

    token_ids          [ 11  12  13 | 21  22  23  24 ]     prompt | sampled
    loss_mask          [  0   0   0 |  1   1   1   1 ]
    spans                             (3, v7)  (5, v8)      tokens 3, 4 from version 7; 5, 6 from version 8
    token_versions()   [ -1  -1  -1 |  7   7   8   8 ]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOT_SAMPLED = -1
"""The version of a token that the policy did not sample (prompt, tool output)."""

TRUNCATED = frozenset({"length", "deadline", "token_budget", "context_full"})
"""Finish reasons that mean: a limit ended the episode, neither the policy nor the environment."""


class WeightId(NamedTuple):
    """Names one set of weights: the learner's incarnation and the version it published.

    A learner that restarts counts a new incarnation, so that weights recomputed after a rollback are never taken for
    the lost ones that had the same version.
    """

    incarnation: int
    version: int


class VersionSpan(NamedTuple):
    """From position ``first_token`` of ``token_ids`` on, sampled tokens came from ``weights``."""

    first_token: int
    weights: WeightId


@dataclass(frozen=True, slots=True)
class TaskRef:
    """One task, as the hub hands it out. ``serial`` counts tasks in the order they were opened, over the whole run.

    ``source[index]`` is the task's content, which the actor looks up; ``epoch`` counts passes over a finite source.
    """

    serial: int
    source: str
    index: int
    epoch: int = 0


class TrajectoryKey(NamedTuple):
    """A trajectory's identity: which task, and which of the group's samples. Attempts at it share the key."""

    task: int
    """``TaskRef.serial``"""
    sample: int
    """0 … group_size − 1"""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One episode with everything that training needs; T tokens, prompt included.

    Raises ``ValueError`` when columns differ in length, spans are out of order or a sampled token has no span.
    """

    task: TaskRef
    sample: int
    attempt: int
    token_ids: NDArray[np.int32]
    """[T]"""
    loss_mask: NDArray[np.uint8]
    """[T], 1 where the policy sampled the token"""
    behavior_logprobs: NDArray[np.float32]
    """[T], log μ of each sampled token, 0 elsewhere"""
    spans: tuple[VersionSpan, ...]
    reward: float
    """The episode's return"""
    finish_reason: str
    """``stop``, one of ``TRUNCATED``, or the environment's own word"""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of the environment's own, averaged into the step's metrics"""
    extras: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    """Optional columns by name (branches, routed experts, sampling masks); absent ones cost nothing"""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        for name in ("loss_mask", "behavior_logprobs"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {n} tokens: columns are per token")
        starts = [span.first_token for span in self.spans]
        if starts != sorted(set(starts)) or (starts and not 0 <= starts[0] <= starts[-1] < n):
            raise ValueError(f"version spans start at {starts}: must ascend and lie within the {n} tokens")
        before_spans = self.loss_mask[: starts[0] if starts else n]
        if np.count_nonzero(before_spans):
            first = int((before_spans != 0).argmax())
            raise ValueError(f"token {first} was sampled, but version spans start at {starts}")

    @property
    def key(self) -> TrajectoryKey:
        return TrajectoryKey(self.task.serial, self.sample)

    @property
    def truncated(self) -> bool:
        return self.finish_reason in TRUNCATED

    def token_versions(self) -> NDArray[np.int64]:
        """[T], the version that sampled each token, ``NOT_SAMPLED`` where none did."""
        versions = np.full(len(self.token_ids), NOT_SAMPLED, dtype=np.int64)
        for version, tokens in self._stretches():
            versions[tokens] = version
        versions[self.loss_mask == 0] = NOT_SAMPLED
        return versions

    def tokens_by_version(self) -> dict[int, int]:
        """Sampled tokens per version, oldest first: all that the staleness bound needs to know."""
        counts: dict[int, int] = {}
        for version, tokens in self._stretches():
            sampled = int(np.count_nonzero(self.loss_mask[tokens]))
            if sampled and version != NOT_SAMPLED:
                counts[version] = counts.get(version, 0) + sampled
        return dict(sorted(counts.items()))

    def _stretches(self) -> Iterator[tuple[int, slice]]:
        """Which tokens stand under which version, those that nobody sampled among them."""
        for i, span in enumerate(self.spans):
            end = self.spans[i + 1].first_token if i + 1 < len(self.spans) else len(self.token_ids)
            yield span.weights.version, slice(span.first_token, end)
