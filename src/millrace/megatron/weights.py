"""The policy's live parameters and the Hugging Face tensors they are made of.

Both ways go through the one mapping of `millrace.converters`; what is added here is which part of the whole model this
rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import Entry, canonical_name, mapping_for
from millrace.converters.safetensors_io import HFReader
from millrace.megatron.model import layers_of_stage
from millrace.megatron.topology import Topology


@dataclass(frozen=True)
class BoundParameter:
    """A parameter of this rank and the mapping's entry for the whole of it."""

    entry: Entry
    tensor: Tensor
    shards: int
    """Ranks that share the whole."""
    rank: int
    """This rank's place among them."""
    replicas: int
    """Ranks that hold the same shard."""
    replica: int

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that share the whole."""
        if self.entry.expert is None:
            return parallel_state.get_tensor_model_parallel_group()
        return parallel_state.get_expert_tensor_parallel_group()


def bind(
    model: torch.nn.Module,
    shape: ModelShape,
    topology: Topology,
    of: Callable[[torch.nn.Parameter], Tensor] | None = None,
) -> list[BoundParameter]:
    """The parameters of this rank, and the buffers that have an entry, in the mapping's order, which is the same on all
    ranks that share them. With `of` what it takes from each parameter instead, such as its gradient.

    Raises ConversionError for a parameter without an entry, and for an entry that this rank's layers should hold and do
    not.
    """
    mapping = mapping_for(shape)
    layers = range(*layers_of_stage(shape, topology.pp, topology.pp_rank))
    each = shape.num_experts // topology.ep
    experts = range(topology.ep_rank * each, (topology.ep_rank + 1) * each)
    take = of or attrgetter("data")
    named = {canonical_name(name, layers, experts.start): take(p) for name, p in model.named_parameters()}
    for name in named:
        mapping[name]  # a parameter without an entry is an error
    buffers = {canonical_name(name, layers, experts.start): b for name, b in model.named_buffers()}
    if of is None:
        named |= {name: buffer for name, buffer in buffers.items() if name in mapping}
    present = named.keys() | buffers.keys()
    for entry in mapping:
        if entry.name not in present and entry.layer in layers and (entry.expert is None or entry.expert in experts):
            raise ConversionError(f"the model on rank {topology.rank} has no parameter for {entry.name}")
    return [_bind_one(entry, named[entry.name], topology) for entry in mapping if entry.name in named]


def _bind_one(entry: Entry, tensor: Tensor, t: Topology) -> BoundParameter:
    if entry.expert is None:
        return BoundParameter(entry, tensor, t.tp, t.tp_rank, t.dp * t.cp, t.dp_rank * t.cp + t.cp_rank)
    return BoundParameter(entry, tensor, t.etp, t.etp_rank, t.edp, t.edp_rank)


@torch.no_grad()
def load_hf(
    parameters: list[BoundParameter],
    shape: ModelShape,
    path: str,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill the parameters from a Hugging Face checkpoint, reading this rank's parts only, cast to the parameters' type.

    `progress` is told the bytes of each parameter that was filled. Raises ConversionError when the checkpoint lacks a
    tensor, has one too many, or one of another shape than config.json says.
    """
    reader = HFReader(path)
    mapping_for(shape).check_names(reader.names)
    for bound in parameters:
        sources = [reader.lazy(name) for name in bound.entry.hf]
        local = bound.entry.to_megatron(sources, bound.shards, bound.rank)
        if local.shape != bound.tensor.shape:
            raise ConversionError(
                f"{bound.entry.name} has shape {list(bound.tensor.shape)} in the model, but {list(local.shape)} by the "
                "mapping"
            )
        bound.tensor.copy_(local)
        progress(local.numel() * local.element_size())


@torch.no_grad()
def hf_tensors(parameters: list[BoundParameter]) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors this rank owns; over all ranks each tensor of the model comes exactly once.

    Collective: every rank iterates to the end. One parameter is whole on one rank at a time. Among the replicas of a
    parameter they take turns. A tensor may share memory with the parameter: use it before the next update.
    """
    for bound in _in_turn(parameters):
        shards = _gather_to_first(bound)
        if shards is not None:
            yield from bound.entry.to_hf(shards).items()


def export_bytes(parameters: list[BoundParameter]) -> int:
    """Bytes of the tensors that `hf_tensors` will yield on this rank."""
    return sum(
        math.prod(shape) * bound.tensor.element_size()
        for bound in _in_turn(parameters)
        if bound.rank == 0
        for shape in bound.entry.hf.values()
    )


def _in_turn(parameters: list[BoundParameter]) -> list[BoundParameter]:
    """The parameters that this rank's replica exports."""
    exported = [bound for bound in parameters if not bound.entry.is_copy]
    return [bound for number, bound in enumerate(exported) if number % bound.replicas == bound.replica]


def _gather_to_first(bound: BoundParameter) -> list[Tensor] | None:
    """All shards of a parameter on the first rank of its group, None on the others."""
    if bound.shards == 1:
        return [bound.tensor]
    if bound.entry.rule.kind == "replicated":
        return [bound.tensor] * bound.shards if bound.rank == 0 else None
    shards = [torch.empty_like(bound.tensor) for _ in range(bound.shards)] if bound.rank == 0 else None
    dist.gather(bound.tensor.contiguous(), shards, group=bound.group, group_dst=0)
    return shards
