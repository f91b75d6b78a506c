"""Runs microbatches through Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime_async.learner.megatron.batch import Microbatch
from slime_async.learner.megatron.model import LearnerModel

LossFunction = Callable[[Microbatch, Tensor], Tensor]
"""(microbatch, hidden states [P / sp, 1, h]) → this microbatch's share of the global loss; called on the last stage"""


def run_microbatches(
    model: LearnerModel, microbatches: Sequence[Microbatch], loss: LossFunction, *, forward_only: bool = False
) -> None:
    """Forward (and backward) over all microbatches; afterwards the gradients are summed over all DP ranks.

    Every DP rank must bring equally many microbatches; where stages are interleaved, a multiple of their number.
    """

    def forward_step(
        batches: Iterator[Microbatch], module: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, None]]]:
        microbatch = next(batches)
        hidden = module(microbatch.tokens, microbatch.positions, None, packed_seq_params=microbatch.packed)

        def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor, None]:
            return loss(microbatch, hidden), torch.zeros((), dtype=torch.int), None

        return hidden, loss_of

    chunks = model.chunks
    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func()
    schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks] if interleaved else iter(microbatches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].tokens.size(1),
        micro_batch_size=1,
        forward_only=forward_only,
    )
