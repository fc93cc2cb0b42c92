"""What the GPU tests compare, computed on one rank of one device: `measure.py JOBS.json`.

Each job names its kind, a key of KINDS, with that function's arguments, and the file `out` for what it returns. All
jobs of a call run on one device, for a process that has adapted Megatron-Core to the CPU cannot go back.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainerConfig,
)
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.policy import Policy
from millrace.megatron.topology import init_distributed
from millrace.megatron.verify_worker import (
    example_batch,
    gradients,
    seeded_tokens,
    transformers_model,
    weighted_log_likelihood,
)

SEED = 7
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1)


@contextmanager
def policy_of(
    device: str,
    model: str,
    dtype: str,
    *,
    capacity: int = 4096,
    distributed: bool = False,
    precision: dict[str, Any] | None = None,
    load: bool = True,
    trains: bool = True,
    offload: bool = False,
    lora: dict[str, Any] | None = None,
    switches: dict[str, Any] | None = None,
) -> Iterator[Policy]:
    """A policy in process groups of its own; `switches` are further keys of its trainer."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    parallel = ParallelConfig()
    trainer = TrainerConfig(
        device=device,
        max_tokens_per_micro_batch=capacity,
        distributed_optimizer=distributed,
        offload_optimizer=offload,
        threads_per_rank=1,
        **switches or {},
    )
    topology = init_distributed(parallel, trainer, SEED)
    policy = Policy(
        ModelConfig(path=model, dtype=dtype, lora=None if lora is None else LoraConfig(**lora)),
        ModelShape.from_hf(model),
        parallel,
        trainer,
        topology,
        optimizer=OPTIMIZER if trains else None,
        seed=SEED,
        precision=PrecisionConfig(**precision or {}),
    )
    if load:
        policy.load_hf(model)
    try:
        yield policy
    finally:
        topology.close()


def computed(device: str, model: str, dtype: str, **settings: Any) -> dict[str, Any]:
    """Logits, log-probs, gradients, and the losses of a few steps."""
    with policy_of(device, model, dtype, **settings) as policy:
        batch = example_batch(policy.shape, SEED)
        return {
            "logits": policy.logits(seeded_tokens(policy.shape, SEED)),
            "logp": policy.logprobs(batch)[0],
            "gradients": dict(gradients(policy, batch)),
            "losses": [policy.train_step(batch, weighted_log_likelihood)["loss"] for _ in range(3)],
            "layers": policy.module.config.transformer_impl,
        }


def in_fp8_alone(device: str, model: str, precision: dict[str, Any], folder: str) -> dict[str, Any]:
    """What is exported after loading and after a few steps, their losses, and what a policy without FP8 exports of a
    checkpoint from there."""
    with policy_of(device, model, "bfloat16", distributed=True, precision=precision) as policy:
        found: dict[str, Any] = {"loaded": exported(policy)}
        batch = example_batch(policy.shape, SEED)
        found["losses"] = [policy.train_step(batch, weighted_log_likelihood)["loss"] for _ in range(3)]
        found["learned"] = exported(policy)
        found["logp"] = policy.logprobs(batch)[0]
        Checkpointer(folder, keep=1).save(policy, policy.step, {})
    with policy_of(device, model, "bfloat16", distributed=True, precision=precision, load=False) as policy:
        Checkpointer(folder, keep=1).load(policy)
        found["logp when resumed"] = policy.logprobs(batch)[0]
    with policy_of(device, model, "bfloat16", distributed=True, load=False) as policy:
        Checkpointer(folder, keep=1).load(policy)
        return {**found, "read without FP8": exported(policy)}


def exported(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in policy.hf_tensors()}


def by_transformers(device: str, model: str) -> dict[str, Any]:
    """Logits and gradients of the same batches, gradients under transformers' names."""
    reference, shape = transformers_model(model).to(device), ModelShape.from_hf(model)
    batch, parts = example_batch(shape, SEED), []
    with torch.no_grad():
        logits = reference(seeded_tokens(shape, SEED).to(device)).logits.float().cpu()
    for tokens in batch.sequences():
        logp = reference(tokens[None].to(device)).logits[0].log_softmax(-1)
        parts += [logp.new_zeros(1), logp[:-1].gather(1, tokens[1:, None].to(device))[:, 0]]
    streams = {"weight": batch.streams["weight"].to(device)}
    weighted_log_likelihood(torch.cat(parts), streams, batch.segment_ids.to(device))[0].backward()
    found = {name: p.grad.cpu() for name, p in reference.named_parameters() if p.grad is not None}
    return {"logits": logits, "gradients": found}


def one_linear(
    device: str, model: str, precision: dict[str, Any], linear_name: str = "mlp.linear_fc2"
) -> dict[str, Any]:
    """Output and gradients of one linear layer, from inputs that are the same everywhere."""
    with policy_of(device, model, "bfloat16", precision=precision, trains=False) as policy:
        layer: Any = policy.module.decoder.layers[0]
        linear: Any = layer.get_submodule(linear_name)
        x, gradient = (_seeded(n, 64, size) for n, size in ((1, linear.weight.shape[1]), (2, linear.weight.shape[0])))
        x, gradient = (t.to(policy.topology.device).bfloat16() for t in (x, gradient))
        x.requires_grad_()
        linear.weight.requires_grad_()
        with _fp8_products(layer.config):
            output, _ = linear(x)
        plain = x.detach().float() @ linear.weight.detach().float().T
        of_x, of_weight = torch.autograd.grad(output, (x, linear.weight), gradient)
        named = {"y": output, "dx": of_x, "dw": of_weight, "y without FP8": plain}
        return {name: t.detach().float().cpu() for name, t in named.items()}


def _seeded(seed: int, rows: int, columns: int) -> Tensor:
    """[rows, 1, columns], with a few values far from the others, as activations have."""
    values = torch.randn(rows, 1, columns, generator=torch.Generator().manual_seed(seed))
    return values * torch.where(torch.arange(columns) % 37 == 0, 8.0, 1.0)


def _fp8_products(config: Any) -> Any:
    """Transformer Engine's context; the emulation has none."""
    if config.fp8 is None:
        return nullcontext()
    from megatron.core.fp8_utils import get_fp8_context

    return get_fp8_context(config)


def trained(
    device: str,
    model: str,
    dtype: str,
    *,
    distributed: bool,
    steps: int,
    load: str | None = None,
    save: str | None = None,
    forget: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Go on from the checkpoint `load` for some steps, with `forget` without its moments, and leave another in
    `save`."""
    with policy_of(device, model, dtype, distributed=distributed, load=load is None, **settings) as policy:
        if load is not None:
            Checkpointer(load, keep=1).load(policy)
        if forget:
            policy.reset_optimizer(OPTIMIZER, total_steps=0)
        batch = example_batch(policy.shape, SEED)
        losses = [policy.train_step(batch, weighted_log_likelihood)["loss"] for _ in range(steps)]
        if save is not None:
            Checkpointer(save, keep=1).save(policy, policy.step, {})
        logits = policy.logits(seeded_tokens(policy.shape, SEED))
        return {"losses": losses, "step": policy.step, "logits": logits, "offloaded": policy.offloaded_bytes}


KINDS = {
    "computed": computed,
    "by_transformers": by_transformers,
    "in_fp8_alone": in_fp8_alone,
    "one_linear": one_linear,
    "trained": trained,
}


def main(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        kind, out = KINDS[job.pop("kind")], job.pop("out")
        torch.save(kind(**job), out)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
