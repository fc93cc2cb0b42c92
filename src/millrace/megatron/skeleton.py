"""How Megatron-Core stores a model, asked of Megatron-Core itself, with a model that has shapes and no values.

Which keys a checkpoint has, which layers' norms carry the names of Transformer Engine's fused modules, how experts are
stacked and matrices split: all of it follows from the modules that a model is built of. Here they are built on the
meta device, as one rank, and saved by the very functions that a run's ranks use; what would be written is noted down
instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import canonical_name, mapping_for
from millrace.converters.streaming import Layout, Part
from millrace.megatron.cpu import adapt
from millrace.megatron.model import build_model
from millrace.megatron.sharded_state import InProcessSave, sharded_state

CPU = torch.device("cpu")


class ShapesOnly(TorchFunctionMode):
    """Makes every new tensor one of the meta device, which has a shape and no memory, wherever it was to be."""

    _factories = _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            _, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            return args[0] if dtype is None else func(args[0], dtype)
        if func is torch.nn.init.normal_:  # of values that are not there; it would take most of the time
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in self._factories:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


class _Notes(FileSystemWriter):
    """Notes which tensors a save would write, and where each stands in the whole; writes all but the tensors."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, thread_count=1, sync_files=True)
        self.tensors: list[tuple[str, tuple[int, ...], Tensor]] = []
        self.sizes: dict[str, tuple[int, ...]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        others = []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                others.append(item)
                continue
            assert item.tensor_data is not None
            self.sizes[item.index.fqn] = tuple(item.tensor_data.size)
            at = tuple(item.tensor_data.chunk.offsets)
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            self.tensors.append((item.index.fqn, at, tensor))
        if not others:
            nothing: Future[list[WriteResult]] = Future()
            nothing.set_result([])
            return nothing
        return super().write_data(SavePlan(others, storage_data=plan.storage_data), planner)


class _NotingSave(InProcessSave):
    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self.notes = notes

    def writer(self, folder: Path | str) -> FileSystemWriter:
        return self.notes


def megatron_layout(shape: ModelShape, folder: Path) -> Layout:
    """The layout of a model's checkpoints. Into `folder`, which must be empty, goes everything of a checkpoint that is
    no tensor: Megatron-Core's small files, and the table of the tensors without their data types and places.

    Call it in a process of its own: it joins process groups and adapts Megatron-Core. Raises ConversionError for a
    tensor that is no part of a parameter with a line in the family's table.
    """
    adapt()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    notes = _Notes(folder)
    with ShapesOnly():
        model = build_model(shape, ParallelConfig(), TrainerConfig(device="cpu"), torch.bfloat16, CPU)
    dist_checkpointing.save(sharded_state(model, None), str(folder), _NotingSave(notes))
    owners = {_storage(tensor): canonical_name(name) for name, tensor in _tensors_of(model)}
    parameters = {canonical_name(name): tensor for name, tensor in _tensors_of(model)}
    layout = Layout(_parts(notes, owners), notes.sizes)
    _check_whole(layout, parameters, shape)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return layout


def _tensors_of(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _storage(tensor: Tensor) -> int:
    """The same for a tensor and its views."""
    return tensor.untyped_storage()._cdata


def _parts(notes: _Notes, owners: dict[int, str]) -> dict[str, tuple[Part, ...]]:
    found: dict[str, list[Part]] = {}
    for key, at, tensor in notes.tensors:
        name = owners.get(_storage(tensor))
        if name is None:
            raise ConversionError(f"Megatron-Core stores {key} as something else than a part of a parameter")
        part = Part(key, at, tuple(tensor.shape), tensor.storage_offset(), tuple(tensor.stride()))
        found.setdefault(name, []).append(part)
    return {name: tuple(parts) for name, parts in found.items()}


def _check_whole(layout: Layout, parameters: dict[str, Tensor], shape: ModelShape) -> None:
    """Raises ConversionError unless each parameter has an entry of its shape, and each entry parts that fill it."""
    mapping = mapping_for(shape)
    for name in layout.parts:
        mapping[name]
    for entry in mapping:
        if entry.is_copy:
            continue
        if entry.name not in layout.parts:
            raise ConversionError(f"the model has no parameter for {entry.name}")
        local, built = entry.local_shape(1), tuple(parameters[entry.name].shape)
        if local != built:
            raise ConversionError(
                f"{entry.name} has shape {list(built)} in the model, but {list(local)} by the mapping"
            )
        covered = sum(torch.Size(part.shape).numel() for part in layout.parts[entry.name])
        if covered != torch.Size(local).numel():
            raise ConversionError(f"Megatron-Core does not store all of {entry.name}")
