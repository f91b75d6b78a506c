"""torch.distributed and Megatron's process groups, from the environment that torchrun sets."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from slime_async.learner.megatron.options import Layout

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that dies leaves the others waiting in a collective for at most this long"""


def world_size_from_environment() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(layout: Layout, seed: int) -> torch.device:
    """Join the other ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and form all groups; the device to use.

    A process on its own needs none of these variables and no port.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if layout.world_size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        else:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return device


def data_parallel_leaders(device: torch.device) -> list[int]:
    """The first global rank of each data-parallel rank, in order. A collective."""
    mine = torch.tensor([parallel_state.get_data_parallel_rank()], dtype=torch.int64, device=device)
    all_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    numbers = [int(number) for number in all_ranks]
    return [numbers.index(number) for number in range(parallel_state.get_data_parallel_world_size())]


def shut_down() -> None:
    """Leave all groups; the process may initialise again afterwards."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_data_and_pipeline(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Join what the last pipeline stages of all DP ranks hold, in place; other stages must bring the neutral element.

    Tensor- and context-parallel ranks hold the same values already.
    """
    for group in (parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        if group.size() > 1:
            dist.all_reduce(values, op, group=group)
    return values
