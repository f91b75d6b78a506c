"""Host arrays to the learner's device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on ``device``. To a GPU it goes through pinned memory, so that the host need not wait until the device has
    worked off what was asked of it before."""
    tensor = torch.from_numpy(values)
    tensor = tensor if dtype is None else tensor.to(dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
