"""What the trainer reads and what it reports: one trajectory's columns, and one step's result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slime_async.correction import PolicyBatch
from slime_async.learner.transfer import to_device

Columns = Sequence[NDArray[np.float32]]
"""Per sequence, one number per token [T]; position 0 is 0, since nothing predicts the first token"""


_COLUMNS = (
    "loss_mask",
    "weight_mask",
    "behavior_logprobs",
    "staleness",
    "advantages",
    "rewards",
    "values",
    "value_targets",
    "routed_experts",
)


@dataclass(frozen=True, slots=True, eq=False)
class TrainSequence:
    """One trajectory, ready to train on: columns with one entry per token, prompt included.

    Raises ``ValueError`` when columns differ in length.
    """

    token_ids: NDArray[np.int32]
    """[T]"""
    loss_mask: NDArray[np.uint8]
    """[T], 1 where the policy sampled the token; what denominators count"""
    weight_mask: NDArray[np.uint8]
    """[T], 0 where the token is masked as stale"""
    behavior_logprobs: NDArray[np.float32]
    """[T], log μ"""
    advantages: NDArray[np.float32] | float
    """[T], or one number for all tokens"""
    staleness: NDArray[np.int64]
    """[T], learner version − the token's version"""
    rewards: NDArray[np.float32] | None = None
    """[T], what each token earned; where a critic makes advantages of them"""
    values: NDArray[np.float32] | None = None
    """[T], the critic's before the batch"""
    value_targets: NDArray[np.float32] | None = None
    """[T], what they should have been"""
    routed_experts: NDArray[np.int16] | None = None
    """[T, layers, experts per token] that the engine recorded, −1 where it did not"""
    group: int = 0
    """Trajectories of one group stay in one minibatch when a batch is trained in several optimizer steps"""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        for name in _COLUMNS:
            column = getattr(self, name)
            if column is not None and np.ndim(column) and len(column) != n:
                raise ValueError(f"{name} has {len(column)} entries for {n} tokens: columns are per token")
        if n == 0:
            raise ValueError("a sequence has no tokens: there is nothing to condition on or to train")

    @property
    def has_advantage(self) -> bool:
        """Whether any sampled token's advantage differs from 0."""
        return bool(np.any((np.asarray(self.advantages) != 0) & (self.loss_mask != 0)))

    @property
    def sampled_tokens(self) -> int:
        """Those that a prefix predicts: all but a first one."""
        return int(np.count_nonzero(self.loss_mask[1:]))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What training on one batch did; the same on every rank."""

    loss: float
    """Mean over the optimizer steps"""
    grad_norm: float
    """Before clipping; mean over the optimizer steps"""
    learning_rate: float
    """Of the last optimizer step"""
    tokens_computed: int
    """Tokens that went through the model, prompts included"""
    tokens_counted: int
    """Tokens in the denominators: sampled, before any masking"""
    metrics: dict[str, float]
    """Over the tokens computed; sequences without advantage are not, where they may be skipped"""


def policy_batch(
    sequences: Sequence[TrainSequence], prox: Columns | None, reference: Columns | None, device: torch.device
) -> PolicyBatch:
    """Columns of tokens 1 … T − 1 of each sequence: those that have a current log-probability."""
    lengths = [len(s.token_ids) - 1 for s in sequences]

    def column(values: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        parts = [v[1:] for v in values]
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return to_device(joined, device, dtype)

    return PolicyBatch(
        sequence_ids=to_device(np.repeat(np.arange(len(sequences)), lengths), device),
        num_sequences=len(sequences),
        loss_mask=column([s.loss_mask for s in sequences], torch.float32),
        weight_mask=column([s.weight_mask for s in sequences], torch.float32),
        behavior_logprobs=column([s.behavior_logprobs for s in sequences], torch.float32),
        advantages=column([np.broadcast_to(s.advantages, s.token_ids.shape) for s in sequences], torch.float32),
        staleness=column([s.staleness for s in sequences], torch.int64),
        prox_logprobs=None if prox is None else column(prox, torch.float32),
        ref_logprobs=None if reference is None else column(reference, torch.float32),
    )


def split_minibatches(groups: Sequence[int], count: int) -> list[list[int]]:
    """Indices of ``count`` disjoint minibatches of whole groups, in order, as even in groups as they divide.

    Raises ``ValueError`` when there are fewer groups than minibatches.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < count:
        raise ValueError(f"{len(names)} groups cannot be split over learner.optimizer_steps = {count}")
    minibatch_of = {name: i * count // len(names) for i, name in enumerate(names)}
    minibatches: list[list[int]] = [[] for _ in range(count)]
    for index, group in enumerate(groups):
        minibatches[minibatch_of[group]].append(index)
    return minibatches
