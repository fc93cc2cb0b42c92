"""Several sets of weights for one model: each rank keeps its shards of the others in host memory and swaps them in.

So a teacher scores on the trainer's own ranks and GPUs without a second model there, at the price of one copy from host
memory. Only parameters (and buffers with an entry in the mapping) move, with LoRA the adapters alone; optimizer state
and master weights stay. Where parameters exist in FP8 alone the master weights move, and those follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.megatron import weights
from millrace.megatron.policy import Policy

HostWeights = Sequence[Tensor]
"""This rank's shards in host memory, always in the same order; pinned where there is a GPU."""


@torch.no_grad()
def copy_to_host(policy: Policy) -> HostWeights:
    """A copy of the weights that the policy's model has now on this rank."""
    pinned = policy.topology.device.type == "cuda"
    with policy.weights_present():
        return [torch.empty_like(t, device="cpu", pin_memory=pinned).copy_(t) for t in _tensors(policy)]


@torch.no_grad()
def put(policy: Policy, host: HostWeights) -> None:
    """Give the policy's model the weights of `host`, which `copy_to_host` took of a model of the same layout.
    Collective."""
    with policy.weights_present():
        for tensor, kept in zip(_tensors(policy), host, strict=True):
            tensor.copy_(kept, non_blocking=True)
        if policy.masters is not None:
            policy.masters.write()


def _tensors(policy: Policy) -> list[Tensor]:
    """What differs between sets of weights: all of them, or the adapters, which stand on one frozen base."""
    policy.gather_parameters()
    if policy.config.lora is not None:
        return [factor.data for adapter in policy.adapters for factor in (adapter.A, adapter.B)]
    bound = weights.bind(policy.module, policy.shape, policy.topology, masters=policy.masters)
    masters = [] if policy.masters is None else policy.masters.parts()
    return [each.tensor for each in bound if each.master is None] + masters
