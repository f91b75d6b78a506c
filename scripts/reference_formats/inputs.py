"""The batches that cases name, packed as the learner packs them, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime_async.correction.ratios import Sequences


@dataclass(frozen=True, eq=False)
class Inputs:
    """Columns [T] of one batch; ``current`` collects the gradient."""

    sequences: Sequences
    lengths: list[int]
    mask: Tensor
    behavior: Tensor
    prox: Tensor
    current: Tensor
    reference: Tensor
    advantages: Tensor

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Inputs:
        rows = batch["sequences"]
        lengths = [len(row["loss_mask"]) for row in rows]

        def column(name: str) -> Tensor:
            return torch.tensor([value for row in rows for value in row.get(name, ())], dtype=torch.float64)

        ids = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths, dtype=torch.int64))
        return cls(
            sequences=Sequences(ids, len(rows)),
            lengths=lengths,
            mask=column("loss_mask"),
            behavior=column("behave_logp"),
            prox=column("prox_logp"),
            current=column("cur_logp").requires_grad_(),
            reference=column("ref_logp"),
            advantages=column("advantages"),
        )

    @property
    def tokens_per_sequence(self) -> Tensor:
        return self.sequences.sum(self.mask)

    def unpacked(self, column: Tensor) -> list[list[float]]:
        """[T] → one list per sequence."""
        return [part.tolist() for part in column.detach().split(self.lengths)]

    def with_gradient(self, loss: Tensor) -> list[list[float]]:
        """d loss / d current log-probs, one list per sequence."""
        (gradient,) = torch.autograd.grad(loss, self.current)
        return self.unpacked(gradient)


def to_float32(value: float) -> float:
    """Rounded as a source does that averages in float32."""
    return float(torch.tensor(value, dtype=torch.float32))
