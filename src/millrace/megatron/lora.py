"""LoRA (Hu et al., 2021): low-rank adapters of the model's linears, at any parallel layout.

    y = x W^T + s (x A^T) B^T,    s = alpha / r, or alpha / sqrt(r) with rsLoRA

W is frozen. An adapter is attached to a linear as the submodule `lora` and adds its part to what the linear returns, so
that the linear keeps its class and its names. Megatron-Core's own linears and Transformer Engine's are treated alike:
how an adapter is cut is read from the mapping's entry of the weight.

    column   W and B are cut by rows (outputs), in the same order; every rank holds A.
    row      W and A are cut by columns (inputs); every rank holds B.

Only the r numbers a token has between the two factors travel between ranks. With sequence parallelism the factor that
every rank holds sees part of the tokens, and Megatron-Core adds its gradients up over the ranks. Experts take and give
whole tokens and sum their outputs in the dispatcher, which is linear, so there nothing travels; the factor that every
expert-tensor rank holds then has part of its gradient on each, which `sum_gradients_over_expert_ranks` adds up.

Legend: T tokens, I inputs and O outputs of the linear on this rank, n Hugging Face modules in one linear, r rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from millrace.config.model_shape import ModelShape
from millrace.config.schema import LoraConfig
from millrace.converters.adapters import (
    ADAPTER_FILE,
    AdapterEntry,
    AdapterSettings,
    adapter_entries,
    check_adapter_names,
    read_adapter_config,
    scaling,
)
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import Entry, mapping_for
from millrace.converters.rules import Sections
from millrace.converters.safetensors_io import HFReader
from millrace.megatron.topology import Topology
from millrace.megatron.weights import ADAPTER, BoundParameter, CanonicalNames, bind_one


class LoraAdapter(torch.nn.Module):
    """The adapter of one linear: its factors A [n r, I] and B [rows with an adapter, r] on this rank."""

    rows: Tensor | None
    """Where the rows of B stand among the linear's outputs; None when each output has its row."""
    columns: Tensor | None
    """[rows of B, n]: which module's A each row belongs to; None with one module."""

    def __init__(self, linear: torch.nn.Module, entry: AdapterEntry, config: LoraConfig, topology: Topology) -> None:
        super().__init__()
        self.entry = entry
        self.scaling = scaling(config.rank, config.alpha, rank_stabilised=config.rslora)
        self.dropout = config.dropout
        self.expert = entry.base.expert is not None
        self.row = entry.base.rule.kind == "row"
        self.shards = topology.etp if self.expert else topology.tp
        shard = topology.etp_rank if self.expert else topology.tp_rank
        self.sequence_parallel = bool(getattr(linear, "sequence_parallel", False)) and not self.expert
        weight = cast(Tensor, linear.weight)
        self.A = torch.nn.Parameter(weight.new_zeros(entry.a.local_shape(self.shards)))
        self.B = torch.nn.Parameter(weight.new_zeros(entry.b.local_shape(self.shards)))
        owners = entry.row_owners(self.shards, shard)
        self._place_rows(owners, len(entry.modules), weight.device)
        self._mark(weight, shard)

    def _place_rows(self, owners: Tensor, modules: int, device: torch.device) -> None:
        whole = bool((owners >= 0).all())
        self.outputs = owners.shape[0]
        rows = None if whole else (owners >= 0).nonzero()[:, 0].to(device)
        columns = None if modules == 1 else F.one_hot(owners[owners >= 0], modules).to(device, torch.bool)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def _mark(self, weight: Tensor, shard: int) -> None:
        """Tell Megatron-Core how the factors' gradients are reduced, and how often each counts in the norm."""
        whole, cut = (self.B, self.A) if self.row else (self.A, self.B)
        for factor in (self.A, self.B):
            # Expert gradients go to the expert-data-parallel group exactly where the linear's own would.
            setattr(factor, "allreduce", getattr(weight, "allreduce", True))  # noqa: B010
            # Experts differ between tensor-parallel ranks, so there none may pass for a duplicate by its rank alone.
            setattr(factor, "tensor_model_parallel", factor is cut or self.expert)  # noqa: B010
        setattr(whole, "sequence_parallel", self.sequence_parallel)  # noqa: B010
        setattr(whole, "shared", self.expert and shard > 0)  # noqa: B010
        setattr(whole, "sum_over_expert_ranks", self.expert and self.shards > 1)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> what the linear's output [..., O] gains."""
        inner = F.linear(self._dropped(x), self.A)
        return F.linear(self._between_ranks(inner) * self.scaling, self._placed_b())

    def delta(self) -> Tensor:
        """What the linear's weight on this rank [O, I] gains with the adapter merged into it, in float32 at least."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return (self._placed_b().to(dtype) @ self.A.to(dtype)) * self.scaling

    def merged(self, weight: Tensor) -> Tensor:
        """The linear's weight with the adapter in it, rounded once to the weight's own type."""
        delta = self.delta()
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def _placed_b(self) -> Tensor:
        """B as [O, n r]: each row in its place, and in the columns of its module's A."""
        b: Tensor = self.B
        if self.columns is not None:
            b = (b[:, None, :] * self.columns[:, :, None]).flatten(1)
        if self.rows is not None:
            b = b.new_zeros(self.outputs, b.shape[1]).index_copy(0, self.rows, b)
        return b

    def _between_ranks(self, inner: Tensor) -> Tensor:
        if self.expert or self.shards == 1:
            return inner
        group = parallel_state.get_tensor_model_parallel_group()
        if self.row and self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=group)
        if self.row:
            return reduce_from_tensor_model_parallel_region(inner, group=group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, group=group)
        return copy_to_tensor_model_parallel_region(inner, group=group)

    def _dropped(self, x: Tensor) -> Tensor:
        """Inputs that every tensor-parallel rank has are dropped alike on all of them, others differently."""
        if not self.dropout or not self.training:
            return x
        same = self.shards == 1 or not (self.row or self.sequence_parallel)
        with nullcontext() if same else get_cuda_rng_tracker().fork():
            return F.dropout(x, self.dropout)


def entries(shape: ModelShape, config: LoraConfig) -> list[AdapterEntry]:
    """The adapters of the whole model. Raises ConversionError for a target that it does not have."""
    return list(adapter_entries(mapping_for(shape), config.rank, config.targets).values())


def adapts_experts(shape: ModelShape, config: LoraConfig | None) -> bool:
    """Whether routed experts get adapters, for which each must be a module of its own."""
    return config is not None and any(entry.base.expert is not None for entry in entries(shape, config))


def attach(model: torch.nn.Module, shape: ModelShape, config: LoraConfig, topology: Topology) -> list[LoraAdapter]:
    """Give the targeted linears of this rank's stage their adapters, whose factors are 0 until `reset`; freeze all
    other parameters. Raises ConversionError for a target that the model does not have."""
    waiting = {entry.base.name: entry for entry in entries(shape, config)}
    names = CanonicalNames(shape, topology)
    model.requires_grad_(False)
    adapters = []
    for name, linear in list(model.named_modules()):
        for parameter, _ in linear.named_parameters(recurse=False):
            entry = waiting.pop(names(f"{name}.{parameter}"), None)
            if entry is None:
                continue
            if parameter != "weight":
                raise ConversionError(
                    f"{name} holds the weights of several experts in one grouped linear, which can have no adapters; "
                    "leave the experts' modules out of model.lora.targets"
                )
            adapters.append(_attach_one(linear, entry, config, topology))
    if left := [entry.base.name for entry in waiting.values() if names.here(entry.base)]:
        raise ConversionError(f"the model on rank {topology.rank} has no linear {left[0]} to adapt")
    if isinstance(embedding := getattr(model, "embedding", None), torch.nn.Module):
        # With a frozen embedding nothing before the first adapter needs a gradient; recomputed layers and pipeline
        # stages find out from their inputs whether they have one to compute.
        embedding.register_forward_hook(_ask_for_gradient)
    return adapters


def _attach_one(linear: torch.nn.Module, entry: AdapterEntry, config: LoraConfig, topology: Topology) -> LoraAdapter:
    adapter = LoraAdapter(linear, entry, config, topology)
    linear.add_module(ADAPTER, adapter)
    linear.register_forward_hook(_add_adapter)
    return adapter


def _add_adapter(linear: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> Any:
    x = inputs[0]
    if getattr(linear, "layer_norm_weight", None) is not None:  # Transformer Engine's norm and linear in one
        gain = linear.layer_norm_weight + 1 if linear.zero_centered_gamma else linear.layer_norm_weight
        x = F.rms_norm(x, (x.shape[-1],), gain, linear.eps)
    result, bias = output
    return result + linear.lora(x), bias


def _ask_for_gradient(embedding: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


@torch.no_grad()
def reset(adapters: list[LoraAdapter], seed: int) -> None:
    """Fresh adapters, which add nothing: A uniform as PEFT draws it (Kaiming with a = sqrt(5), that is within 1 /
    sqrt(inputs)), B zero. Each module's A depends on seed and name alone, so it is the same at every layout."""
    for adapter in adapters:
        shard = _shard(adapter)
        whole = [_draw(name, shape, seed) for name, shape in adapter.entry.a.hf.items()]
        adapter.A.copy_(adapter.entry.a.to_megatron(whole, adapter.shards, shard))
        adapter.B.zero_()


def _shard(adapter: LoraAdapter) -> int:
    if adapter.expert:
        return parallel_state.get_expert_tensor_parallel_rank()
    return parallel_state.get_tensor_model_parallel_rank()


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def sum_gradients_over_expert_ranks(model: torch.nn.Module) -> None:
    """Add up, over the ranks that share an expert, the gradients of the factors that each of them holds whole."""
    gradients = [getattr(p, "main_grad") for p in model.parameters() if getattr(p, "sum_over_expert_ranks", False)]  # noqa: B009
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for same in by_type.values():
        flat = _flatten_dense_tensors(same)
        dist.all_reduce(flat, group=parallel_state.get_expert_tensor_parallel_group())
        for gradient, summed in zip(same, _unflatten_dense_tensors(flat, same), strict=True):
            gradient.copy_(summed)


def bind(
    adapters: list[LoraAdapter], topology: Topology, of: Callable[[torch.nn.Parameter], Tensor] | None = None
) -> list[BoundParameter]:
    """The factors of this rank with their entries, whose Hugging Face names are PEFT's; `of` as for `weights.bind`."""
    take = of or attrgetter("data")
    factors = [pair for a in adapters for pair in ((a.entry.a, a.A), (a.entry.b, a.B))]
    return [bind_one(entry, take(parameter), topology) for entry, parameter in factors]


def settings(config: LoraConfig) -> AdapterSettings:
    return AdapterSettings(config.rank, config.alpha, config.rslora, config.targets, config.dropout)


@torch.no_grad()
def load(adapters: list[LoraAdapter], config: LoraConfig, shape: ModelShape, topology: Topology, folder: str) -> None:
    """Take the factors of a PEFT adapter, of which each rank reads its own parts. Raises ConversionError for one of
    another rank, scaling or choice of modules."""
    theirs, file = read_adapter_config(folder), Path(folder) / ADAPTER_FILE
    mine = settings(config)
    for key, own, other in (
        ("rank", mine.rank, theirs.rank),
        ("alpha", mine.alpha, theirs.alpha),
        ("rslora", mine.rank_stabilised, theirs.rank_stabilised),
    ):
        if own != other:
            raise ConversionError(f"{folder} has {key} {other}, but model.lora.{key} is {own}; make them equal")
    reader = HFReader(file)
    check_adapter_names(reader.names, entries(shape, config), file)
    for bound in bind(adapters, topology):
        bound.tensor.copy_(bound.entry.to_megatron([reader.lazy(n) for n in bound.entry.hf], bound.shards, bound.rank))


def sharded(model: torch.nn.Module, topology: Topology) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """The factors of this rank as Megatron-Core's checkpoints take them, by the names of the module's parameters."""
    state: dict[str, ShardedTensor | ShardedTensorFactory] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, LoraAdapter):
            a, b = bind([module], topology, of=lambda parameter: parameter)
            state[f"{prefix}.A"], state[f"{prefix}.B"] = _sharded(a), _sharded(b)
    return state


def _sharded(bound: BoundParameter) -> ShardedTensor | ShardedTensorFactory:
    kind, key = bound.entry.rule.kind, bound.entry.name
    if kind == "replicated":
        return ShardedTensor.from_rank_offsets(key, bound.tensor, replica_id=(0, bound.rank, bound.replica))
    replica = (0, 0, bound.replica)
    if kind == "row":
        return ShardedTensor.from_rank_offsets(key, bound.tensor, (1, bound.rank, bound.shards), replica_id=replica)
    return _cut_by_rows(bound, replica)


def _cut_by_rows(bound: BoundParameter, replica: tuple[int, int, int]) -> ShardedTensorFactory:
    """A fused B, whose rows on a rank are interleaved with the layout: one tensor in the checkpoint for each block of
    rows that is cut evenly over the ranks, so that any layout finds its own."""
    markers, blocks = _block_markers(bound.entry)
    places = [
        (bound.entry.rule.shard(markers, bound.shards, bound.rank)[:, 0] == block).nonzero()[:, 0]
        for block in range(blocks)
    ]

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                f"{key}.{block}",
                tensor.index_select(0, rows.to(tensor.device)),
                (0, bound.rank, bound.shards),
                replica_id=replica_id,
            )
            for block, rows in enumerate(places)
        ]

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        together = torch.cat(parts)
        return torch.empty_like(together).index_copy(0, torch.cat(places).to(together.device), together)

    return ShardedTensorFactory(bound.entry.name, bound.tensor, build, merge, replica_id=replica)


def _block_markers(entry: Entry) -> tuple[list[Tensor], int]:
    """For each Hugging Face tensor the number of the block that each of its rows belongs to, and the number of
    blocks."""
    rows = [shape[0] for shape in entry.hf.values()]
    sizes = entry.rule.sizes if isinstance(entry.rule, Sections) else rows
    numbers = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return list(numbers[:, None].split(rows)), len(sizes)
