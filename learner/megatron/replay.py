"""Routing replay: a mixture of experts takes the experts that the engine recorded, with its own probabilities for them.

Before each layer's forward pass, and before its recomputation, a hook hands the layer's router what the microbatch
carries; microbatches may be in flight in any order. Where nothing was recorded, the router chooses as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from numpy.typing import NDArray
from torch import Tensor

from slime_async.learner.megatron.architecture import Architecture
from slime_async.routing import NOT_RECORDED

TopK = Callable[..., tuple[Tensor, Tensor]]


class RecordedExperts:
    """What megatron-core asks in place of its top-k."""

    def __init__(self) -> None:
        self.experts: Tensor | None = None
        """[tokens of this rank, k], −1 where nothing was recorded; None for a microbatch without records"""

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        own_scores, own = compute_topk(scores, topk, num_groups, group_topk)
        if self.experts is None:
            return own_scores, own
        chosen = torch.where(self.experts == NOT_RECORDED, own, self.experts.long())
        return scores.gather(1, chosen), chosen


def replay_in(module: torch.nn.Module) -> None:
    """Make every layer of experts in ``module`` follow ``PackedSequences.routes``."""
    for layer in module.modules():
        if isinstance(layer, TransformerLayer) and isinstance(layer.mlp, MoELayer):
            layer.mlp.router.router_replay = RecordedExperts()
            layer.register_forward_pre_hook(_hand_over, with_kwargs=True)


def _hand_over(layer: Any, _arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    routes = named["packed_seq_params"].routes
    replay = layer.mlp.router.router_replay
    replay.experts = None if routes is None else routes[layer.layer_number - 1]


def check_routes(model: Architecture, routes: Sequence[NDArray[np.int16] | None]) -> None:
    """Raises ``ValueError`` for records of another model."""
    if model.experts is None:
        raise ValueError(f"trajectories carry routed experts, but a {model.model_type} model has none")
    shape = (model.layers, model.experts.per_token)
    for recorded in routes:
        if recorded is None or not recorded.size:
            continue
        if recorded.shape[1:] != shape or not NOT_RECORDED <= recorded.min() <= recorded.max() < model.experts.count:
            raise ValueError(
                f"routed experts {recorded.min()} … {recorded.max()} of shape {recorded.shape} do not fit this model: "
                f"(tokens, {shape[0]} layers, {shape[1]} experts per token) below {model.experts.count}"
            )


def pack_routes(
    routes: list[NDArray[np.int16] | None], lengths: list[int], mine: NDArray[np.int64], sequence_parallel: bool
) -> NDArray[np.int16] | None:
    """[layers, tokens that this rank's routers see, k]; None where no sequence has a record.

    ``routes`` are [T, layers, k] per sequence, ``lengths`` of the sequences in the packed row (padding last), ``mine``
    the rows of it that this context-parallel rank holds.
    """
    known = next((r for r in routes if r is not None), None)
    if known is None:
        return None
    whole = np.full((sum(lengths), *known.shape[1:]), NOT_RECORDED, dtype=np.int16)
    starts = np.cumsum([0, *lengths])
    for start, recorded in zip(starts, routes, strict=False):
        if recorded is not None:
            whole[start : start + len(recorded)] = recorded
    held = whole[mine]
    if sequence_parallel:
        parts = np.split(held, parallel_state.get_tensor_model_parallel_world_size())
        held = parts[parallel_state.get_tensor_model_parallel_rank()]
    return np.ascontiguousarray(held.swapaxes(0, 1))
