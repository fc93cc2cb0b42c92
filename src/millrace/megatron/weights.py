"""The policy's live parameters and the Hugging Face tensors they are made of.

Both ways go through the one mapping of `millrace.converters`; what is added here is which part of the whole model this
rank holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.converters.errors import ConversionError
from millrace.converters.mapping import Entry, canonical_name, mapping_for
from millrace.converters.safetensors_io import HFReader
from millrace.megatron.master_weights import MasterWeight, MasterWeights
from millrace.megatron.topology import Topology

log = logging.getLogger(__name__)


class Adapter(Protocol):
    """What is trained beside a frozen weight and merged into it on the way out."""

    def merged(self, weight: Tensor) -> Tensor:
        """This rank's part of the weight with the adapter in it."""
        ...


ADAPTER = "lora"
"""Name of the submodule that adapts its parent's weight."""


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
    adapter: Adapter | None = None
    master: MasterWeight | None = None
    """What the tensor was rounded from, where it is in FP8."""

    @property
    def merged(self) -> Tensor:
        """The tensor itself, or with its adapter in it."""
        return self.tensor if self.adapter is None else self.adapter.merged(self.tensor)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that share the whole."""
        if self.entry.expert is None:
            return parallel_state.get_tensor_model_parallel_group()
        return parallel_state.get_expert_tensor_parallel_group()


class CanonicalNames:
    """What the mapping calls the parameters of this rank's module."""

    def __init__(self, shape: ModelShape, topology: Topology) -> None:
        self.layers = shape.stage_layers(topology.pp, topology.pp_rank)
        each = shape.num_experts // topology.ep
        self.experts = range(topology.ep_rank * each, (topology.ep_rank + 1) * each)

    def __call__(self, name: str) -> str:
        return canonical_name(name, self.layers, self.experts.start)

    def here(self, entry: Entry) -> bool:
        """Whether a parameter of a layer is one of this rank's."""
        return entry.layer in self.layers and (entry.expert is None or entry.expert in self.experts)


def bind(
    model: torch.nn.Module,
    shape: ModelShape,
    topology: Topology,
    of: Callable[[torch.nn.Parameter], Tensor] | None = None,
    masters: MasterWeights | None = None,
) -> list[BoundParameter]:
    """The parameters of this rank, and the buffers that have an entry, in the mapping's order, which is the same on all
    ranks that share them. With `of` what it takes from each parameter instead, such as its gradient. Adapters are no
    parameters of their own here, but belong to the weights they adapt, as do the `masters` of weights in FP8.

    Raises ConversionError for a parameter without an entry, and for an entry that this rank's layers should hold and do
    not.
    """
    mapping, names = mapping_for(shape), CanonicalNames(shape, topology)
    take = of or attrgetter("data")
    own = [(name, p) for name, p in model.named_parameters() if not is_adapter_parameter(name)]
    named = {names(name): take(p) for name, p in own}
    for name in named:
        mapping[name]  # a parameter without an entry is an error
    rounded = {names(name): master for name, p in own if masters is not None and (master := masters.of(p))}
    adapters: dict[str, Adapter] = {}
    buffers = {names(name): b for name, b in model.named_buffers()}
    if of is None:
        named |= {name: buffer for name, buffer in buffers.items() if name in mapping}
        modules = model.named_modules()
        adapters = {names(f"{name}.weight"): m.lora for name, m in modules if hasattr(m, ADAPTER)}
    present = named.keys() | buffers.keys()
    for entry in mapping:
        if entry.name not in present and names.here(entry):
            raise ConversionError(f"the model on rank {topology.rank} has no parameter for {entry.name}")
    return [
        bind_one(entry, named[entry.name], topology, adapters.get(entry.name), rounded.get(entry.name))
        for entry in mapping
        if entry.name in named
    ]


def is_adapter_parameter(name: str) -> bool:
    """Whether a module's parameter of this name belongs to an adapter."""
    return f".{ADAPTER}." in name


def bind_one(
    entry: Entry, tensor: Tensor, t: Topology, adapter: Adapter | None = None, master: MasterWeight | None = None
) -> BoundParameter:
    """A parameter of this rank, or what takes its shape, with its place among the ranks."""
    if entry.expert is None:
        replica = t.dp_rank * t.cp + t.cp_rank
        return BoundParameter(entry, tensor, t.tp, t.tp_rank, t.dp * t.cp, replica, adapter, master)
    return BoundParameter(entry, tensor, t.etp, t.etp_rank, t.edp, t.edp_rank, adapter, master)


@torch.no_grad()
def load_hf(
    parameters: list[BoundParameter],
    shape: ModelShape,
    path: str,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill the parameters from a Hugging Face checkpoint, reading this rank's parts only, cast to the parameters' type.
    Of those in FP8 the masters are filled.

    `progress` is told the bytes of each parameter that was filled. Raises ConversionError when the checkpoint lacks a
    tensor, has one too many, or one of another shape than config.json says.
    """
    reader, mapping = HFReader(path), mapping_for(shape)
    mapping.check_names(reader.names)
    if (unread := mapping.unread_names(reader.names)) and dist.get_rank() == 0:
        log.warning(
            "%s: %d tensors of the layers for multi-token prediction (%s...) are left out; they are not trained, and "
            "exports will not hold them",
            path,
            len(unread),
            ", ".join(mapping.unread),
        )
    for bound in parameters:
        sources = [reader.lazy(name) for name in bound.entry.hf]
        local = bound.entry.to_megatron(sources, bound.shards, bound.rank)
        if local.shape != bound.tensor.shape:
            raise ConversionError(
                f"{bound.entry.name} has shape {list(bound.tensor.shape)} in the model, but {list(local.shape)} by the "
                "mapping"
            )
        if bound.master is None:
            bound.tensor.copy_(local)
        else:
            bound.master.take(local)
        progress(local.numel() * local.element_size())


@torch.no_grad()
def hf_tensors(parameters: list[BoundParameter], *, few_owners: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors this rank owns, adapters merged; over all ranks each tensor of the model comes exactly
    once.

    Ranks that hold the same take turns, so that each owns about as much; with `few_owners` one rank of each pipeline
    stage and group of experts owns all that its group holds. A parameter is gathered within the ranks that share it, to
    its owner alone, and is whole there as long as it is the present one. What is in FP8 comes from its master weight,
    which all ranks that share it gather before.

    Collective: every rank iterates to the end. A tensor may share memory with the parameter: use it before the next
    update.
    """
    for bound, owner in _exported(parameters, few_owners):
        if bound.master is not None:
            bound = replace(bound, tensor=bound.master.gathered())
        shards = None if owner is None else _gather(bound, owner)
        if shards is not None:
            yield from bound.entry.to_hf(shards).items()


def owned_bytes(parameters: list[BoundParameter], *, few_owners: bool = False) -> int:
    """Bytes of the tensors that `hf_tensors` will yield on this rank."""
    return sum(
        math.prod(shape) * bound.tensor.element_size()
        for bound, owner in _exported(parameters, few_owners)
        if bound.rank == owner
        for shape in bound.entry.hf.values()
    )


def _exported(parameters: list[BoundParameter], few_owners: bool) -> Iterator[tuple[BoundParameter, int | None]]:
    """The parameters that are exported, each with its owner's place among the ranks that share it; None where another
    replica than this rank's exports it."""
    exported = [bound for bound in parameters if not bound.entry.is_copy]
    for number, bound in enumerate(exported):
        turn = 0 if few_owners else number
        mine = turn % bound.replicas == bound.replica
        yield bound, turn // bound.replicas % bound.shards if mine else None


def _gather(bound: BoundParameter, owner: int) -> list[Tensor] | None:
    """All shards of a parameter on its owner, None on the others."""
    if bound.shards == 1:
        return [bound.merged]
    if bound.entry.rule.kind == "replicated":
        return [bound.merged] * bound.shards if bound.rank == owner else None
    own = bound.merged.contiguous()
    shards = [torch.empty_like(own) for _ in range(bound.shards)] if bound.rank == owner else None
    dist.gather(own, shards, group=bound.group, group_dst=owner)
    return shards
