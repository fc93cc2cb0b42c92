"""Megatron-Core's data parallelism as this project uses it: gradients that are sums, added up in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from millrace.config.schema import PrecisionConfig, TrainerConfig
from millrace.megatron import lora
from millrace.megatron.master_weights import require_attributes
from millrace.megatron.model import HiddenStateModel
from millrace.megatron.precision import PLAIN, data_parallel_options


def with_gradient_buffers(
    module: HiddenStateModel, trainer: TrainerConfig, precision: PrecisionConfig
) -> DistributedDataParallel:
    """Megatron-Core's data parallelism: gradients add up in float32 buffers, reduced once a step by plain sums."""
    config = module.config
    config.finalize_model_grads_func = _finalize_sums
    require_attributes(module)
    wrapped = DistributedDataParallel(config, data_parallel_settings(trainer, precision), module)
    if trainer.overlap_gradient_reduction:
        config.no_sync_func = wrapped.no_sync  # gradients of all but the last micro-batch only add up
    return wrapped


def data_parallel_settings(trainer: TrainerConfig, precision: PrecisionConfig = PLAIN) -> DistributedDataParallelConfig:
    """Megatron-Core's description of data parallelism."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=trainer.overlap_gradient_reduction,
        overlap_param_gather=trainer.overlap_parameter_gather,
        use_distributed_optimizer=trainer.distributed_optimizer,
        **data_parallel_options(precision),
    )


def _finalize_sums(model: Sequence[torch.nn.Module], num_tokens: Tensor | None = None, **options: Any) -> None:
    """Reduce gradients without dividing by a number of tokens: the loss's weights hold every division already."""
    finalize_model_grads(list(model), None, **options)
    for chunk in model:
        lora.sum_gradients_over_expert_ranks(chunk)
