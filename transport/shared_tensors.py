"""Tensors that another process of this machine can open in place: CUDA IPC on a GPU that both use, else shared memory.

NCCL refuses two ranks on one device, so this is how weights go over where engine and learner share a GPU. What travels
is a handle per tensor, never a pickle; ``Reduction`` is torch's own recipe to open it, which ``open_tensor`` follows
here and which SGLang's server follows when it is handed one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from slime_async.protocol import CudaMemory, HostMemory, SharedTensor, TensorSpec
from slime_async.transport.weight_layout import torch_dtype


class Reduction:
    """A call that makes an object. Pickled, it is the object's own pickle."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments

    def follow(self) -> Any:
        arguments = (a.follow() if isinstance(a, Reduction) else a for a in self.arguments)
        return self.function(*arguments)


class Shares:
    """Handles to tensors whose memory stays for as long as this lives.

    On a GPU an allocation is shared once, however many tensors lie in it and however often they are opened: each time
    would cost a call to the driver, and an event of which a process has a thousand. So whoever opens one waits for
    nothing that is still being written: hand handles out after that.
    """

    def __init__(self) -> None:
        self._allocations: dict[int, tuple[Any, CudaMemory]] = {}

    def share(self, tensor: Tensor) -> SharedTensor:
        """A handle that, on the CPU, one process may open once. Raises ``ValueError`` for one that is not contiguous.

        On the CPU the tensor's whole storage moves to shared memory the first time.
        """
        if not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous: share a copy of it")
        storage: Any = tensor.untyped_storage()
        if not tensor.is_cuda:
            memory = HostMemory(*storage._share_filename_cpu_())
            storage._shared_incref()  # whoever opens it gives this one back
            return SharedTensor(int(tensor.storage_offset()), memory)
        known = self._allocations.get(storage.data_ptr())
        if known is None:
            known = self._allocations[storage.data_ptr()] = storage, CudaMemory(*storage._share_cuda_())
        return SharedTensor(int(tensor.storage_offset()), known[1])


def reduction(spec: TensorSpec, shared: SharedTensor) -> Reduction:
    """How the tensor that ``spec`` describes is opened, as torch itself would write it down."""
    dtype, shape = torch_dtype(spec.dtype), torch.Size(spec.shape)
    stride = torch.empty(shape, device="meta").stride()
    memory = shared.memory
    if isinstance(memory, HostMemory):
        untyped = Reduction(
            reductions.rebuild_storage_filename, torch.UntypedStorage, memory.manager, memory.handle, memory.size
        )
        storage = Reduction(reductions.rebuild_typed_storage, untyped, dtype)
        return Reduction(reductions.rebuild_tensor, Tensor, storage, (shared.offset, shape, stride, False))
    return Reduction(
        reductions.rebuild_cuda_tensor,
        Tensor,
        shape,
        stride,
        shared.offset,
        torch.storage.TypedStorage,
        dtype,
        memory.device,
        memory.handle,
        memory.size,
        memory.offset,
        False,
        memory.ref_counter,
        memory.ref_counter_offset,
        memory.event,
        memory.event_sync_required,
    )


def open_tensor(spec: TensorSpec, shared: SharedTensor) -> Tensor:
    """The tensor itself, in the other process's memory. Raises ``RuntimeError`` when that is gone."""
    tensor: Tensor = reduction(spec, shared).follow()
    return tensor
