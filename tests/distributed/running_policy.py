"""Policies of tiny models on the ranks that a test has started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, TrainerConfig
from millrace.megatron.policy import Policy
from millrace.megatron.precision import PLAIN
from millrace.megatron.topology import init_distributed


def cpu_trainer(**settings: Any) -> TrainerConfig:
    """A trainer on CPU ranks of one thread, in which a rank that waits for another gives up after a minute."""
    return TrainerConfig(device="cpu", threads_per_rank=1, collective_timeout_s=60, **settings)


@contextmanager
def running_policy(
    model: ModelConfig,
    parallel: ParallelConfig,
    trainer: TrainerConfig,
    *,
    optimizer: OptimizerConfig | None,
    port: int | None = None,
    seed: int = 1,
    precision: PrecisionConfig = PLAIN,
) -> Iterator[Policy]:
    """A policy without weights yet, in process groups of its own: ranks meet at `port`, or one above the last time."""
    os.environ["MASTER_PORT"] = str(port or int(os.environ["MASTER_PORT"]) + 1)
    topology = init_distributed(parallel, trainer, seed=seed)
    try:
        shape = ModelShape.from_hf(model.path)
        yield Policy(model, shape, parallel, trainer, topology, optimizer=optimizer, seed=seed, precision=precision)
    finally:
        topology.close()


def copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors as they are now, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors}
