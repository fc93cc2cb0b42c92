"""What models are made of, built without memory: `engine_modules.py JOBS.json OUT.json`.

Transformer Engine loads without a GPU, and its modules can be constructed on the meta device. Told that there is a GPU,
the process builds them as a run would, one rank of any layout at a time, with process groups that exchange nothing.
No kernel runs. A job names a model, a layout, a precision and what the linears are to be: `engine` or `plain`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ParallelConfig, PrecisionConfig, TrainerConfig
from millrace.megatron import kernels, topology, weights
from millrace.megatron.gaps import fill_gaps
from millrace.megatron.model import HiddenStateModel, build_model

CUDA = torch.device("cuda", 0)
META = "meta"
GPUS = {"hopper": ((9, 0), "NVIDIA H200"), "blackwell": ((10, 0), "NVIDIA B200")}


def pretend_gpu() -> None:
    """Answer for a GPU whose memory is the meta device."""
    to = torch.Tensor.to

    def to_meta(self: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        return to(self, *(META if arg == CUDA else arg for arg in args), **named)

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: META  # type: ignore[return-value,assignment]
    torch.cuda.Stream = lambda *args, **named: None  # type: ignore[misc,assignment]
    torch.Tensor.to = to_meta  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *args, **named: to(self, META)  # type: ignore[method-assign]
    torch.nn.Module.to = lambda self, *args, **named: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **named: self  # type: ignore[method-assign]
    CudaRNGStatesTracker.fork = lambda self, *args: contextlib.nullcontext()  # type: ignore[method-assign]
    fill_gaps()


def take_gpu(name: str) -> None:
    """Be a GPU of this generation; what Transformer Engine remembers of another is forgotten."""
    (major, minor), title = GPUS[name]
    facts = SimpleNamespace(major=major, minor=minor, name=title, multi_processor_count=132)
    torch.cuda.get_device_properties = lambda *device: facts  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *device: (major, minor)
    torch.cuda.get_device_name = lambda *device: title
    for module in ("utils", "quantization"):
        for member in vars(importlib.import_module(f"transformer_engine.pytorch.{module}")).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


@contextlib.contextmanager
def ranks_of(parallel: ParallelConfig, rank: int) -> Iterator[topology.Topology]:
    """This process as one of the ranks of a layout."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False,
    )
    try:
        yield topology._current_topology(CUDA)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def linears_of(kind: str) -> Iterator[None]:
    """Whether Transformer Engine shall be there."""
    there = kernels.transformer_engine_is_there
    if kind == "plain":
        kernels.transformer_engine_is_there = lambda: False
    try:
        yield
    finally:
        kernels.transformer_engine_is_there = there


def built(
    model: str,
    linears: str,
    parallel: dict[str, Any],
    rank: int,
    gpu: str,
    precision: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What one rank's part of a model is made of."""
    layout, shape = ParallelConfig(**parallel), ModelShape.from_hf(model)
    settings = TrainerConfig(device="cuda", **trainer or {})
    take_gpu(gpu)
    with ranks_of(layout, rank) as ranks, linears_of(linears):
        fp8 = PrecisionConfig(**precision or {})
        module = build_model(shape, layout, settings, torch.bfloat16, CUDA, precision=fp8)
        return {
            "classes": sorted({type(part).__name__ for part in module.modules()}),
            "checkpoint": checkpoint_of(module),
            "tensors": [name for b in weights.bind(module, shape, ranks) for name in b.entry.hf],
            "parameters": sum(p.numel() for p in module.parameters()),
            "recipe": recipe_of(module.config),
        }


def checkpoint_of(module: HiddenStateModel) -> dict[str, Any]:
    """Shape and place of every tensor that a rank puts into a checkpoint."""
    found: dict[str, Any] = {}

    def look(part: Any) -> None:
        if isinstance(part, ShardedTensorFactory):
            look(part.build())
        elif isinstance(part, ShardedTensor):
            place = [list(part.global_shape), list(part.global_offset), list(part.local_shape), str(part.dtype)]
            found.setdefault(part.key, []).append(place)
        elif isinstance(part, dict | list | tuple):
            for inner in part.values() if isinstance(part, dict) else part:
                look(inner)

    look(module.sharded_state_dict())
    return {key: sorted(places) for key, places in found.items()}


def recipe_of(config: Any) -> list[Any] | None:
    """The recipe object that Megatron-Core makes for the layers: its class and its fields."""
    if not config.fp8:
        return None
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(config)
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return [type(recipe).__name__, {name: getattr(value, "name", value) for name, value in fields.items()}]


def check_user_buffers() -> None:
    """Take the place of the function that allocates them, with the arguments of the installed release, whose layers
    refuse to be built before it was called."""
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    takes = inspect.signature(base.initialize_ub)

    def initialize_ub(*args: Any, **named: Any) -> None:
        takes.bind(*args, **named)
        assert not base.is_ub_initialized()
        vars(base)["_ub_initialized"] = True

    vars(base)["initialize_ub"] = initialize_ub


def main(jobs: Path, out: Path) -> None:
    pretend_gpu()
    check_user_buffers()
    found = {name: built(**job) for name, job in json.loads(jobs.read_text()).items()}
    out.write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
