"""Updated parameters that stay in parts, one on each data-parallel rank, until they are read.

With `trainer.overlap_parameter_gather` an update leaves each rank with the new values of its own part of every bucket
of parameters. Megatron-Core gathers a bucket before the forward pass of the first module that owns one of its
parameters, and the next bucket while that one computes. Whoever reads parameters in another way finishes the gather
first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel


class ParameterGather:
    """The outstanding gathers of one model. Each method is collective, and does nothing where all is gathered."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        for module in model.module.modules():
            # A Mamba-2 mixer reads the weights of its convolution, which it never calls.
            if isinstance(convolution := getattr(module, "conv1d", None), torch.nn.Module):
                parameters = list(convolution.parameters())
                module.register_forward_pre_hook(lambda *unused, of=parameters: self.finish_of(of))

    def finish(self) -> None:
        """Have all parameters whole on every rank."""
        for groups in (self._model.bucket_groups, self._model.expert_parallel_bucket_groups):
            for group in reversed(groups):  # in the order of the forward pass: each sends the next one off
                group.finish_param_sync()

    def finish_of(self, parameters: Iterable[torch.Tensor]) -> None:
        """Have these whole on every rank; frozen ones always are."""
        for parameter in parameters:
            if (group := self._model.param_to_bucket_group.get(parameter)) is not None:
                group.finish_param_sync()
