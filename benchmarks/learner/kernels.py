"""Where a step's time goes: GPU kernels by name and by kind, and what the host waited for."""

from __future__ import annotations

import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|splitK|aten::(mm|addmm|bmm|matmul)"),
    ("optimizer, clipping, norm of gradients", r"FusedAdam|multi_tensor|LpNorm|adam"),
    ("fused by torch.compile", r"^triton"),
    ("norms", r"layer_norm|LayerNorm|rms_norm|RMSNorm|GammaBeta"),
    ("copies and fills", r"Memcpy|Memset|FillFunctor|direct_copy|CatArray|copy"),
    ("embedding and gathers", r"embedding|index|gather|scatter|sort|radix"),
    ("other elementwise", r"elementwise"),
    ("other reductions", r"reduce"),
)
TOP = 25


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def profile_step(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """One step under torch's profiler: milliseconds by kernel and kind, and the share of time without any."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        begun = time.perf_counter()
        step()
        seconds = time.perf_counter() - begun
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiled.events():
        if event.device_type == wanted and not event.is_user_annotation:
            spent[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
            calls[event.name] += 1
    kinds: dict[str, float] = defaultdict(float)
    for name, microseconds in spent.items():
        kinds[kind_of(name)] += microseconds
    busy = sum(spent.values())
    order = sorted(spent, key=spent.__getitem__, reverse=True)
    return {
        "step_ms": seconds * 1e3,
        "busy_ms": busy / 1e3,
        "idle_share": max(0.0, 1.0 - busy / 1e6 / seconds),
        "kinds": [
            {"kind": kind, "ms": t / 1e3, "share_of_busy": t / busy}
            for kind, t in sorted(kinds.items(), key=lambda item: -item[1])
        ],
        "top": [
            {"kernel": name[:160], "kind": kind_of(name), "calls": calls[name], "ms": spent[name] / 1e3}
            for name in order[:TOP]
        ],
    }


def synchronisations(step: Callable[[], object], device: torch.device) -> list[str]:
    """Where the host waited for the device in a step, each place with how often."""
    if device.type != "cuda":
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = defaultdict(int)
    for warning in caught:
        if "synchronizing" in str(warning.message):
            places[f"{'/'.join(Path(warning.filename).parts[-3:])}:{warning.lineno}"] += 1
    return [f"{count} x {place}" for place, count in sorted(places.items(), key=lambda item: -item[1])]
