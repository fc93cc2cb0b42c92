"""Buffers in which tensor-parallel ranks exchange activations while the products on either side of them compute.

Transformer Engine allocates them once a process, in the shape of one micro-batch's hidden states. Its kernels work on
the whole of a buffer, however many tokens a layer hands them, so that a policy pads every micro-batch to that many.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache

import torch

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ParallelConfig, TrainerConfig
from millrace.megatron.kernels import uses_transformer_engine
from millrace.megatron.topology import LayoutError

log = logging.getLogger(__name__)


def prepare(
    shape: ModelShape, parallel: ParallelConfig, trainer: TrainerConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """Have the buffers before a model is built that takes them. Collective. Raises LayoutError where its layers are not
    Transformer Engine's."""
    if not trainer.overlap_tensor_parallel:
        return
    if not uses_transformer_engine(shape, device, dtype):
        raise LayoutError(
            "trainer.overlap_tensor_parallel is true, but the layers are not Transformer Engine's, which alone have "
            "such buffers: install it and take a model in bfloat16 on CUDA, or set "
            "trainer.overlap_tensor_parallel=false"
        )
    allocate(trainer.max_tokens_per_micro_batch, shape.hidden_size, parallel.tp)


@cache
def allocate(tokens: int, hidden_size: int, ranks: int) -> None:
    """Allocate the buffers, which all models of a process share. Transformer Engine refuses a second shape."""
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    by_mode = hasattr(base, "UserBufferQuantizationMode")  # since 2.7
    unquantised = {"quantization_modes": [base.UserBufferQuantizationMode.NONE]} if by_mode else {"use_fp8": False}
    base.initialize_ub(shape=[tokens, hidden_size], tp_size=ranks, ub_cfgs={}, bootstrap_backend="nccl", **unquantised)
    log.info("%d tensor-parallel ranks exchange micro-batches of %d tokens beside their products", ranks, tokens)
