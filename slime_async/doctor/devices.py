"""GPUs, their driver, and whether torch can use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slime_async.doctor.finding import Finding, error, ok, warning
from slime_async.telemetry.environment import Gpu

DRIVER_FOR_CUDA = {11: 450, 12: 525, 13: 580}
"""Oldest major driver version that runs a CUDA release (NVIDIA's compatibility table)"""
USED_SHARE = 0.1
"""Of a GPU's memory; more is somebody else's work"""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What torch says of itself."""

    cuda: str | None
    """The CUDA release that it was built for; None for a CPU build"""
    devices: int
    """GPUs that it sees"""


def torch_build() -> TorchBuild | str:
    """Import torch and ask it; a text when it does not load."""
    try:
        import torch
    except (ImportError, OSError) as failure:  # OSError: a shared library is missing
        return str(failure)
    return TorchBuild(torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def check_devices(
    gpus: Sequence[Gpu], torch: TorchBuild | str, has_device_files: bool | None = None
) -> Iterator[Finding]:
    """``gpus`` as ``nvidia-smi`` lists them."""
    if isinstance(torch, str):
        yield error("torch", f"cannot be imported: {torch}", "reinstall it: pip install --force-reinstall torch")
        return
    if has_device_files is None:
        has_device_files = Path("/dev/nvidiactl").exists()
    if not gpus:
        if has_device_files:
            yield error(
                "GPU",
                "/dev/nvidiactl is there, but nvidia-smi lists no GPU",
                "install nvidia-utils of the driver's version; in a container, start it with --gpus all",
            )
        elif torch.cuda is not None:
            yield ok("GPU", f"none; torch was built for CUDA {torch.cuda} and computes on the CPU")
        else:
            yield ok("GPU", "none; torch computes on the CPU")
        return
    for number, gpu in enumerate(gpus):
        yield _memory(number, gpu)
    yield from _driver(gpus[0], torch, len(gpus))


def _memory(number: int, gpu: Gpu) -> Finding:
    text = f"{number}: {gpu.name}, {gpu.memory_used_mib:,} of {gpu.memory_total_mib:,} MiB used"
    if gpu.memory_total_mib and gpu.memory_used_mib / gpu.memory_total_mib > USED_SHARE:
        return warning("GPU", text, "another program holds it (nvidia-smi lists them): end it, or leave this GPU out")
    return ok("GPU", text)


def _driver(gpu: Gpu, torch: TorchBuild, gpus: int) -> Iterator[Finding]:
    if torch.cuda is None:
        yield warning(
            "torch",
            f"this build computes on the CPU only, but there {'is a GPU' if gpus == 1 else f'are {gpus} GPUs'}",
            "pip install torch from an index with CUDA (PyPI's is one on Linux)",
        )
        return
    major = int(torch.cuda.partition(".")[0])
    wanted, have = DRIVER_FOR_CUDA.get(major), gpu.driver.partition(".")[0]
    if wanted is not None and have.isdigit() and int(have) < wanted:
        yield error(
            "driver",
            f"{gpu.driver} is too old for CUDA {torch.cuda}, which torch was built for",
            f"install driver {wanted} or newer, or a torch built for an older CUDA",
        )
    elif torch.devices < gpus:
        yield warning(
            "torch",
            f"sees {torch.devices} of {gpus} GPUs",
            "look at CUDA_VISIBLE_DEVICES; if it is as wanted, all is well",
        )
    else:
        yield ok("driver", f"{gpu.driver} with CUDA {torch.cuda}")
