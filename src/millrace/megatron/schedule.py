"""Micro-batches through all pipeline stages, and what the last stage finds brought to every rank.

Legend: T tokens of a micro-batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from millrace.megatron.microbatch import MicroBatch
from millrace.megatron.topology import Topology

OnLastStage = Callable[[MicroBatch, Tensor], tuple[Tensor, Any]]
"""Micro-batch and hidden states [T, H] (or this rank's [T / TP, H]) -> loss and what is collected."""


def run_micro_batches(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], on_last_stage: OnLastStage, *, training: bool
) -> list[Any]:
    """Run Megatron-Core's pipeline schedule, with `training` backward too; what the last stage collects of each
    micro-batch, nothing elsewhere. Collective: every rank has the same number of micro-batches."""
    schedule = get_forward_backward_func()
    with torch.set_grad_enabled(training):
        return schedule(
            forward_step_func=partial(_forward, on_last_stage),
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=max(m.input_ids.numel() for m in micro_batches),
            micro_batch_size=1,
            forward_only=not training,
        )


def _forward(
    on_last_stage: OnLastStage, micro_batches: Iterator[MicroBatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    """One micro-batch through this stage, as Megatron-Core's schedules call it."""
    micro_batch = next(micro_batches)
    output = model(
        input_ids=micro_batch.input_ids[None],
        position_ids=None,
        attention_mask=None,
        packed_seq_params=micro_batch.packed_seq_params(),
    )

    def finish(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        loss, collected = on_last_stage(micro_batch, hidden[:, 0])
        # The middle value, a number of tokens, is what Megatron-Core would divide by; see `data_parallel`.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), collected

    return output, finish


def from_last_stage(values: Tensor, topology: Topology, *, sum_over_dp: bool) -> Tensor:
    """Values of the last pipeline stage on every rank; each data-parallel rank may have filled its own places."""
    if sum_over_dp and topology.dp > 1 and topology.last_stage:
        dist.all_reduce(values, group=topology.dp_group)
    if topology.pp > 1:
        dist.broadcast(values, src=topology.last_stage_rank, group=topology.pp_group)
    return values


def sum_metrics(collected: Sequence[Mapping[str, Tensor]], topology: Topology) -> dict[str, float]:
    """Sums over micro-batches and data-parallel ranks, in float64, equal on every rank."""
    shared: list[Any] = [None]
    if topology.last_stage:
        names = list(collected[0])
        sums = torch.stack([torch.stack([part[name].double() for part in collected]).sum() for name in names])
        if topology.dp > 1:
            dist.all_reduce(sums, group=topology.dp_group)
        shared = [dict(zip(names, sums.tolist(), strict=True))]
    if topology.pp > 1:
        dist.broadcast_object_list(
            shared,
            src=topology.last_stage_rank,
            group=topology.pp_group,
            device=topology.device,
        )
    return shared[0]
