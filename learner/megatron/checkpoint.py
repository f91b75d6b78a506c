"""One rank's part of a distributed checkpoint: weights, optimizer, reference weights, random generators.

The format is megatron-core's own (``torch_dist``: whole tensors by name, each rank writing its shards), so that any
layout reads what another wrote.

The planning is megatron-core's, the writing is not. Its writer starts a manager process (3 to 7 s at the first
checkpoint) and forks one process per file, and the fork of a learner keeps the learner's sockets open: were the learner
killed then, hub and engines would not see its connections close. Here a thread writes copies in host memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.nn import Parameter

from slime_async.learner.megatron.model import LearnerModel
from slime_async.learner.megatron.optimizer_state import (
    ParameterState,
    blank_states,
    parameter_states,
    set_parameter_states,
)


class StateWrite:
    """A checkpoint on its way to disk, written by a thread from copies; every rank has its own."""

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self.error: BaseException | None = None
        """What the thread died of"""
        self.seconds = 0.0
        """That the writing took"""
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def is_over(self, wait_s: float = 0.0) -> bool:
        """Whether the thread has ended, well or not, within ``wait_s``."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Write the index of what all ranks have written. A collective: call it once all threads have ended well."""
        for finalize in self._request.finalize_fns:
            finalize()

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            self._request.async_fn()
        except BaseException as error:  # noqa: BLE001 - the border of a thread: the training loop raises it
            self.error = error
        self.seconds = time.monotonic() - begun


def begin_write(model: LearnerModel, reference: Sequence[Tensor] | None, directory: Path) -> StateWrite:
    """Copy this rank's state to host memory and begin to write it into the empty ``directory``. A collective."""
    state = _sharded_state(model, parameter_states(model), reference) | {"random": _random_state()}
    return StateWrite(dist_checkpointing.save(state, str(directory), _ThreadedSave(), async_sharded_save=True))


def read_state(
    model: LearnerModel, directory: Path, optimizer_steps: int, *, reference: bool, random: bool
) -> list[Tensor] | None:
    """Put the state in ``directory`` into the model and its optimizer. A collective.

    Returns the reference weights where asked for, in the order of the model's parameters. ``random`` restores this
    rank's generators, which only the layout that wrote them has. ``optimizer_steps`` is what Adam had counted.
    """
    parameters = model.parameters()
    held = [torch.empty_like(p) for p in parameters] if reference else None
    wanted = _sharded_state(model, blank_states(model), held) | ({"random": _random_state()} if random else {})
    loaded = dist_checkpointing.load(wanted, str(directory))
    for i, chunk in enumerate(model.chunks):
        chunk.module.load_state_dict(loaded["model"][i])
    set_parameter_states(model, {p: loaded["optimizer"][i] for i, p in enumerate(parameters)}, optimizer_steps)
    if random:
        _restore_random_state(loaded["random"])
    return [loaded["reference"][i] for i in range(len(parameters))] if reference else None


def _sharded_state(
    model: LearnerModel, states: Mapping[Parameter, ParameterState], reference: Sequence[Tensor] | None
) -> dict[str, Any]:
    """Every tensor with its place in the whole: an optimizer's lies where its parameter's does."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    weights = {i: c.module.sharded_state_dict(metadata={"dp_cp_group": group}) for i, c in enumerate(model.chunks)}
    places = {id(shard.data): shard for shard in nested_values(weights)}

    def like(parameter: Parameter, prefix: str, tensor: Tensor) -> Any:
        place = places[id(parameter)]
        dtype = {"dtype": tensor.dtype} if isinstance(place, ShardedTensor) else {}
        return replace(place, key=f"{prefix}.{place.key}", data=tensor, **dtype)

    parameters = model.parameters()
    state: dict[str, Any] = {"model": weights}
    if states:
        state["optimizer"] = {
            i: {name: like(p, f"optimizer.{name}", tensor) for name, tensor in states[p].items()}
            for i, p in enumerate(parameters)
            if p in states
        }
    if reference is not None:
        state["reference"] = {
            i: like(p, "reference", held) for i, (p, held) in enumerate(zip(parameters, reference, strict=True))
        }
    return state


# --------------------------------------------------------------------------------------------------- random generators


def _random_state() -> dict[str, Any]:
    """This rank's generators, as rows of tensors [ranks, bytes]."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"megatron/{name}": s for name, s in tensor_parallel.get_cuda_rng_tracker().get_states().items()}
    row = (0, dist.get_rank(), dist.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(f"random/{name}", state.cpu()[None].clone(), row)
        for name, state in states.items()
    }


def _restore_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"][0])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][0])
    tracked = {name.removeprefix("megatron/"): s[0] for name, s in states.items() if name.startswith("megatron/")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


# ------------------------------------------------------------------------------------------------------------- writing


class _HoldingPlanner(MCoreSavePlanner):  # type: ignore[misc]
    """Gives the writer copies, taken when they were asked for first: training may go on meanwhile."""

    def hold(self, plan: SavePlan) -> None:
        self._copies = {item.index: _host_copy(super(_HoldingPlanner, self).resolve_data(item)) for item in plan.items}

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._copies[write_item.index]


def _host_copy(data: Any) -> Any:
    return data.detach().to("cpu", copy=True) if isinstance(data, Tensor) else data


class _ThreadedWriter(FileSystemWriter):
    """torch's writer, in three steps: copy (here), write (a thread), tell what was written (here, at the end)."""

    def prepare_write_data(self, plan: SavePlan, planner: _HoldingPlanner) -> None:
        planner.hold(plan)
        self._plan, self._planner = plan, planner

    def write(self) -> None:
        self._results: list[WriteResult] = self.write_data(self._plan, self._planner).wait()

    def retrieve_write_results(self) -> list[WriteResult]:
        return self._results


class _ThreadedSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's strategy with the writer above."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        writer = _ThreadedWriter(checkpoint_dir)
        planner = _HoldingPlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        tensors = mcore_to_pyt_state_dict(by_key, False)
        planned, *_ = save_state_dict_async_plan(tensors, writer, None, 0, planner=planner)
        finalize: list[Callable[[], None]] = [lambda: save_state_dict_async_finalize(*planned)]
        return AsyncRequest(writer.write, (), finalize)
