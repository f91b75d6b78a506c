"""Hugging Face weights in and out of a model in any layout.

Loading reads only this rank's slices and needs no communication. Export is a collective: every rank calls it and gets
every whole tensor, in the manifest's order; or, where several ranks are sources, each of them those that it sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from safetensors import safe_open
from torch import Tensor

from slime_async.learner.megatron.architecture import Architecture
from slime_async.learner.megatron.naming import EMBEDDING, OUTPUT, VALUE_HEAD, Unit, global_name, units
from slime_async.learner.megatron.options import Layout
from slime_async.learner.snapshots import Place
from slime_async.learner.sources import Division, divide
from slime_async.protocol import TensorSpec, WeightManifest
from slime_async.telemetry.progress import Progress, silent
from slime_async.transport.weight_layout import tensor_bytes


def manifest(model: Architecture, dtype: torch.dtype) -> WeightManifest:
    """What an export of this model carries; the same for every layout."""
    name = str(dtype).removeprefix("torch.")
    pairs = ((n, s) for unit in units(model) for n, s in zip(unit.hf_names, unit.hf_shapes, strict=True))
    return WeightManifest(tuple(TensorSpec(n, name, s) for n, s in pairs))


class _Checkpoint:
    """The safetensors files of a directory, opened lazily and read by slices."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            handle = safe_open(path, "pt")
            self._files |= dict.fromkeys(handle.keys(), handle)  # type: ignore[no-untyped-call]

    def read(self, name: str, shape: tuple[int, ...], split: str, rank: int, size: int) -> Tensor:
        """Part ``rank`` of ``size`` of a tensor; the last parts are short or empty when rows do not divide."""
        if name not in self._files:
            raise ValueError(f"{self._directory} has no tensor {name}: is it a complete safetensors checkpoint?")
        tensor = self._files[name].get_slice(name)
        if tuple(tensor.get_shape()) != shape:
            raise ValueError(f"{name} in {self._directory} has shape {tensor.get_shape()}, config.json says {shape}")
        if split == "none" or size == 1:
            whole: Tensor = tensor[:]
            return whole
        dim = 0 if split == "rows" else 1
        step = -(-shape[dim] // size)
        part = slice(min(rank * step, shape[dim]), min((rank + 1) * step, shape[dim]))
        sliced: Tensor = tensor[part] if dim == 0 else tensor[:, part]
        return sliced


class WeightMap:
    """Ties the units of a model to this rank's parameters."""

    def __init__(self, architecture: Architecture, layout: Layout, modules: Sequence[torch.nn.Module]) -> None:
        """``modules`` are the unwrapped chunks of this pipeline stage."""
        self._architecture = architecture
        self._units = {unit.name: unit for unit in units(architecture)}
        experts = architecture.experts.count if architecture.experts else 0
        self._experts_per_rank = experts // parallel_state.get_expert_model_parallel_world_size()
        first_expert = parallel_state.get_expert_model_parallel_rank() * self._experts_per_rank
        self._layers_per_chunk = architecture.layers // (layout.pipeline * layout.virtual)
        self._stages, stage = layout.pipeline, parallel_state.get_pipeline_model_parallel_rank()
        self._parameters: dict[str, torch.nn.Parameter] = {}
        for i, module in enumerate(modules):
            first_layer = (i * self._stages + stage) * self._layers_per_chunk
            for name, parameter in module.named_parameters():
                if not name.startswith(VALUE_HEAD):
                    self._parameters[global_name(name, first_layer, first_expert)] = parameter
        parameter = next(modules[0].parameters())
        self._device, self._dtype = parameter.device, parameter.dtype

    def manifest(self) -> WeightManifest:
        return manifest(self._architecture, self._dtype)

    @torch.no_grad()
    def load(self, directory: Path, on_progress: Progress = silent) -> None:
        """Fill this rank's parameters from a checkpoint. Raises ``ValueError`` for missing or misshapen tensors."""
        checkpoint = _Checkpoint(directory)
        for done, (name, parameter) in enumerate(self._parameters.items()):
            on_progress(done, len(self._parameters))
            # a tied model's last pipeline stage has its own copy of the embedding, under the output layer's name
            unit = self._units[EMBEDDING if name == OUTPUT and self._architecture.tied else name]
            rank, size = _tensor_parallel(unit)
            parts = [
                checkpoint.read(n, shape, unit.split, rank, size)
                for n, shape in zip(unit.hf_names, unit.hf_shapes, strict=True)
            ]
            value = self._fuse(unit, parts, size)
            if unit.padded:
                value = F.pad(value, (0, 0, 0, parameter.size(0) - value.size(0)))
            parameter.copy_(value)

    def _fuse(self, unit: Unit, parts: list[Tensor], size: int) -> Tensor:
        """This rank's slices of the Hugging Face tensors → this rank's Megatron tensor."""
        if unit.fusion == "qkv":
            groups = self._architecture.groups // size
            return torch.cat([part.view(groups, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)
        return torch.cat(parts)

    @torch.no_grad()
    def export(self, place: Place | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor) in manifest order, on every rank. A collective: run it to the end.

        Each tensor is written to where ``place`` says, or to fresh memory: nothing shares the model's.
        """
        place = place or (lambda spec: torch.empty(spec.shape, dtype=self._dtype, device=self._device))
        name = str(self._dtype).removeprefix("torch.")
        for unit in self._units.values():
            shapes = zip(unit.hf_names, unit.hf_shapes, strict=True)
            targets = [place(TensorSpec(n, name, shape)) for n, shape in shapes]
            self._assemble(unit, self._gather(unit, self._landing(unit, targets)), targets)
            yield from zip(unit.hf_names, targets, strict=True)

    @torch.no_grad()
    def take_part_in_export(self) -> None:
        """For ranks that want no tensors: the collectives alone."""
        for unit in self._units.values():
            self._gather(unit, None)

    def divide(self, count: int) -> Division:
        """The weights among ``count`` source ranks. A collective."""
        names = list(self._units)
        mine = torch.tensor([name in self._parameters for name in names], dtype=torch.uint8, device=self._device)
        flags = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(flags, mine)
        held = [{name for name, holds in zip(names, rank.tolist(), strict=True) if holds} for rank in flags]
        tensors = {tensor.name: tensor for tensor in self.manifest().tensors}
        sizes = {u.name: sum(tensor_bytes(tensors[name]) for name in u.hf_names) for u in self._units.values()}
        source_of = divide(sizes, held, count)
        parts: dict[int, list[TensorSpec]] = {rank: [] for rank in sorted(set(source_of.values()))}
        for unit in self._units.values():
            parts[source_of[unit.name]] += [tensors[name] for name in unit.hf_names]
        return Division(source_of, {rank: WeightManifest(tuple(part)) for rank, part in parts.items()})

    @torch.no_grad()
    def export_part(self, source_of: Mapping[str, int], place: Place) -> Iterator[tuple[str, Tensor]]:
        """What this rank is the source of, in manifest order, nothing where it is none. A collective: run to the end.

        A unit's shards are gathered by the source's tensor-parallel peers alone, and go no further.
        """
        name, rank = str(self._dtype).removeprefix("torch."), dist.get_rank()
        for unit in self._units.values():
            source = source_of[unit.name]
            if source not in dist.get_process_group_ranks(_tensor_parallel_group(unit)):
                continue
            shapes = zip(unit.hf_names, unit.hf_shapes, strict=True)
            targets = [place(TensorSpec(n, name, shape)) for n, shape in shapes] if rank == source else []
            shards = self._gather_shards(unit, self._landing(unit, targets) if targets else None)
            if targets:
                self._assemble(unit, shards, targets)
                yield from zip(unit.hf_names, targets, strict=True)

    def _landing(self, unit: Unit, targets: list[Tensor]) -> list[Tensor] | None:
        """Parts of the target that shards can be gathered into as they are; None where they have to be rearranged."""
        _, size = _tensor_parallel(unit)
        whole_rows = unit.split == "rows" and unit.hf_shapes[0][0] % size == 0
        if unit.fusion != "one" or (size > 1 and not whole_rows):
            return None
        return list(targets[0].chunk(size)) if size > 1 else [targets[0]]

    def _assemble(self, unit: Unit, shards: list[Tensor], targets: list[Tensor]) -> None:
        """Shards of all tensor-parallel ranks → Hugging Face tensors, each element copied once."""
        if unit.fusion == "qkv":
            self._split_qkv(shards, targets)
        elif unit.fusion == "gate_up":
            for i, shard in enumerate(shards):
                for target, half in zip(targets, shard.chunk(2), strict=True):
                    target.chunk(len(shards))[i].copy_(half)
        elif unit.split == "columns":
            for target, shard in zip(targets[0].chunk(len(shards), 1), shards, strict=True):
                target.copy_(shard)
        else:
            row = 0
            for shard in shards:  # the last ones may be padding
                target = targets[0][row : row + len(shard)]
                if target.data_ptr() != shard.data_ptr():
                    target.copy_(shard[: len(target)])
                row += len(shard)

    def _split_qkv(self, shards: list[Tensor], targets: list[Tensor]) -> None:
        model = self._architecture
        rows = [model.heads // model.groups * model.head_dim, model.head_dim, model.head_dim]
        groups = model.groups // len(shards)
        for i, shard in enumerate(shards):
            parts = torch.split(shard.view(groups, -1, *shard.shape[1:]), rows, 1)
            for target, part, height in zip(targets, parts, rows, strict=True):
                target.view(model.groups, height, *target.shape[1:])[i * groups : (i + 1) * groups].copy_(part)

    def _gather(self, unit: Unit, landing: list[Tensor] | None) -> list[Tensor]:
        """The shards of all tensor-parallel ranks, on every rank: over tensor, then expert, then pipeline ranks.

        Where they travel, they come down in ``landing`` if that is given.
        """
        if unit.name in self._parameters:
            shards = self._gather_shards(unit, landing)
        else:
            shapes = self._shard_shapes(unit, _tensor_parallel(unit)[1])
            shards = landing or [torch.empty(s, dtype=self._dtype, device=self._device) for s in shapes]
        for group, source in self._route(unit):
            for i, tensor in enumerate(shards):
                shards[i] = tensor.contiguous()
                dist.broadcast(shards[i], dist.get_global_rank(group, source), group=group)
        return shards

    def _gather_shards(self, unit: Unit, landing: list[Tensor] | None) -> list[Tensor]:
        """The shards of all tensor-parallel ranks that hold this rank's part of the model, as it does."""
        _, size = _tensor_parallel(unit)
        shard = self._parameters[unit.name].detach()
        if unit.split == "none" or size == 1:
            return [shard]
        shards = landing or [torch.empty_like(shard) for _ in range(size)]
        dist.all_gather(shards, shard.contiguous(), group=_tensor_parallel_group(unit))
        return shards

    def _route(self, unit: Unit) -> list[tuple[dist.ProcessGroup, int]]:
        """The groups over which a unit has to travel, with the rank in each that holds it."""
        hops = []
        expert_group = parallel_state.get_expert_model_parallel_group()
        if unit.expert is not None and expert_group.size() > 1:
            hops.append((expert_group, unit.expert // self._experts_per_rank))
        stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() > 1:
            if unit.layer is not None:
                stage = unit.layer // self._layers_per_chunk % self._stages
            else:
                stage = 0 if unit.name == EMBEDDING else stages.size() - 1
            hops.append((stages, stage))
        return hops

    def _shard_shapes(self, unit: Unit, size: int) -> list[tuple[int, ...]]:
        rows = sum(shape[0] for shape in unit.hf_shapes)
        rest = unit.hf_shapes[0][1:]
        if unit.split == "none":
            return [(rows, *rest)]
        if unit.split == "rows":
            return [(-(-rows // size), *rest)] * size
        return [(rows, rest[0] // size)] * size


def _tensor_parallel(unit: Unit) -> tuple[int, int]:
    """This rank's place in the unit's tensor-parallel group, and the group's size."""
    if unit.expert is not None:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _tensor_parallel_group(unit: Unit) -> dist.ProcessGroup:
    group: dist.ProcessGroup = (
        parallel_state.get_tensor_model_parallel_group()
        if unit.expert is None
        else parallel_state.get_expert_tensor_parallel_group()
    )
    return group
