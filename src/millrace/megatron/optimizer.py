"""The optimizer of a policy and its learning rate.

Adam with decoupled weight decay through Megatron-Core: moments and main weights in float32, sharded over data-parallel
ranks when the recipe asks for the distributed optimizer.
"""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from millrace.config.schema import OptimizerConfig, PrecisionConfig, TrainerConfig
from millrace.megatron.precision import PLAIN, optimizer_options


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of update `step` (from 0) of a schedule of `total_steps` updates.

    The warm-up rises linearly from `warmup_from` at step 0 to `lr` at step `warmup_steps`. Then the rate stays
    (constant), or falls to `min_lr` at step `decay_steps` (`total_steps` when absent) along a straight line or half a
    cosine, and stays there.
    """
    if step < config.warmup_steps:
        return config.warmup_from + (config.lr - config.warmup_from) * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps if config.decay_steps is not None else total_steps
    if end < 1:
        raise ValueError(f"a {config.schedule} schedule needs its number of steps; set optimizer.decay_steps")
    progress = min((step - config.warmup_steps) / max(end - config.warmup_steps, 1), 1.0)
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share


def build_optimizer(
    config: OptimizerConfig,
    trainer: TrainerConfig,
    dtype: torch.dtype,
    model: DistributedDataParallel,
    precision: PrecisionConfig = PLAIN,
) -> MegatronOptimizer:
    """A fresh optimizer over the model's parameters. Collective."""
    return get_megatron_optimizer(optimizer_settings(config, trainer, dtype, precision), [model])


def optimizer_settings(
    config: OptimizerConfig, trainer: TrainerConfig, dtype: torch.dtype, precision: PrecisionConfig = PLAIN
) -> MegatronOptimizerConfig:
    """Megatron-Core's description of the optimizer."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=trainer.distributed_optimizer,
        overlap_param_gather=trainer.overlap_parameter_gather,
        **optimizer_options(precision),
    )


def set_hyper_parameters(optimizer: MegatronOptimizer, config: OptimizerConfig, lr: float) -> None:
    """Give every parameter group this learning rate and the recipe's settings.

    Megatron-Core marks norms and biases with a weight-decay multiplier of 0 and leaves its application to the schedule.
    """
    optimizer.config.clip_grad = config.clip_grad
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["betas"] = tuple(config.betas)
        group["eps"] = config.eps
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
