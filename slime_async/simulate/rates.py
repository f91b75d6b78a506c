"""Rates of a model on a device, from its size alone: for a first plan, before anything was measured.

A decoding step reads all weights and every running request's keys and values once; training a token costs 6 FLOPs per
parameter and attention's share. What devices reach of their data sheets is an assumption, named here.
"""

from __future__ import annotations

from dataclasses import dataclass

from slime_async.simulate.scenario import EngineModel, LearnerModel

BYTES_PER_PARAMETER = 2
"""bf16"""
TRAINING_BYTES_PER_PARAMETER = 18
"""bf16 weights, fp32 gradients, and Adam's fp32 copy and moments, before any sharding"""
BANDWIDTH_REACHED = 0.6
"""Of the data sheet's, while decoding"""
FLOPS_REACHED_TRAINING = 0.35
FLOPS_REACHED_DECODING = 0.4
STEP_OVERHEAD_S = 0.002
"""Of a decoding step: scheduling, sampling, launches"""
BATCHES_SHOWN = (1, 8, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Device:
    """A data sheet's numbers, dense bf16."""

    flops: float
    bandwidth: float
    """Bytes per second"""
    memory: float
    """Bytes"""


DEVICES = {
    "a100": Device(312e12, 2.0e12, 80e9),
    "h100": Device(989e12, 3.35e12, 80e9),
    "h200": Device(989e12, 4.8e12, 141e9),
    "b200": Device(2250e12, 8.0e12, 180e9),
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What speed depends on."""

    parameters: float
    active_parameters: float
    """Per token; fewer than all in a mixture of experts"""
    kv_bytes_per_token: float

    @classmethod
    def of(cls, parameters: float, active: float | None = None, kv_bytes: float | None = None) -> ModelSize:
        """Without ``kv_bytes``, about what models with grouped queries have: 144 kB at 4B, growing with the root."""
        return cls(parameters, active or parameters, kv_bytes or 144e3 * (parameters / 4e9) ** 0.5)

    def engine_devices(self, device: Device) -> int:
        """The least power of two on which the weights leave half of the memory to keys and values."""
        return _power_of_two(self.parameters * BYTES_PER_PARAMETER / (0.5 * device.memory))

    def learner_devices(self, device: Device) -> int:
        """The least power of two that holds the training state in 70% of its memory."""
        return _power_of_two(self.parameters * TRAINING_BYTES_PER_PARAMETER / (0.7 * device.memory))

    def engine(self, device: Device, mean_context: float, max_running: int) -> EngineModel:
        ranks = self.engine_devices(device)
        room = (0.85 * device.memory * ranks - self.parameters * BYTES_PER_PARAMETER) / self.kv_bytes_per_token
        running = max(1, min(max_running, int(room / mean_context)))
        sizes = sorted({*(n for n in BATCHES_SHOWN if n < running), running})
        points = tuple((float(n), self._step_s(device, ranks, n, mean_context)) for n in sizes)
        return EngineModel(devices=ranks, max_running=running, step_s=points)

    def learner(self, device: Device, devices: int) -> LearnerModel:
        token_s = 6 * self.active_parameters / (device.flops * FLOPS_REACHED_TRAINING * devices)
        return LearnerModel(devices=devices, token_s=token_s)

    def _step_s(self, device: Device, ranks: int, running: int, mean_context: float) -> float:
        read = self.active_parameters if running == 1 else self.parameters
        moved = read * BYTES_PER_PARAMETER + running * mean_context * self.kv_bytes_per_token
        computed = 2 * self.active_parameters * running
        return STEP_OVERHEAD_S + max(
            moved / (device.bandwidth * BANDWIDTH_REACHED * ranks),
            computed / (device.flops * FLOPS_REACHED_DECODING * ranks),
        )


def _power_of_two(least: float) -> int:
    devices = 1
    while devices < least:
        devices *= 2
    return devices
