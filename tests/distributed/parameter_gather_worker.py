"""One of four ranks of the test of overlapped parameter gathers: `parameter_gather_worker.py FOLDER`; each rank writes
FOLDER/found-RANK.pt.

FOLDER holds the checkpoints qwen3/, qwen3_moe/, gemma3_text/ and nemotron_h/.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layout_data import example_batch, negative_log_likelihood
from running_policy import cpu_trainer
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from millrace.megatron import data_parallel
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.lent_weights import copy_to_host
from millrace.megatron.policy import Policy
from millrace.megatron.topology import init_distributed

TENSOR = ParallelConfig(tp=2, dp=2, sequence_parallel=True)
CASES: dict[str, tuple[str, ParallelConfig, dict[str, Any]]] = {
    "experts": ("qwen3_moe", replace(TENSOR, ep=2), {}),
    "tied, in a pipeline": ("gemma3_text", ParallelConfig(pp=2, dp=2), {"dtype": "bfloat16"}),
    "hybrid": ("nemotron_h", TENSOR, {}),
    "adapters": ("qwen3", TENSOR, {"lora": LoraConfig(rank=4)}),
}
BUCKET = 2000
"""Parameters of a bucket, so that tiny models have many, and the head one of its own."""


def found_in(folder: Path, case: str) -> list[dict[str, Any]]:
    """What a policy gives without and with overlapped gathers."""
    family, parallel, of_model = CASES[case]
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    trainer = cpu_trainer(
        max_tokens_per_micro_batch=64,
        distributed_optimizer=True,
        overlap_gradient_reduction=True,
    )
    topology = init_distributed(parallel, trainer, seed=1)
    model = ModelConfig(path=str(folder / family), **{"dtype": "float32", **of_model})
    shape = ModelShape.from_hf(model.path)
    found = []
    for overlap in (False, True):
        switched = replace(trainer, overlap_parameter_gather=overlap)
        policy = Policy(model, shape, parallel, switched, topology, optimizer=OptimizerConfig(lr=1e-3), seed=1)
        policy.load_hf(model.path)
        found.append(read_after_updates(policy))
        if case != "hybrid":
            found[-1] |= kept_after_updates(policy, Checkpointer(folder / f"{case}, {overlap}", keep=1))
    topology.close()
    return found


def update(policy: Policy) -> None:
    policy.train_step(example_batch(), negative_log_likelihood)


def read_after_updates(policy: Policy) -> dict[str, Any]:
    """Log-probs right after an update, and weights right after another."""
    update(policy)
    update(policy)
    found: dict[str, Any] = {"log-probs": policy.logprobs(example_batch())[0]}
    update(policy)
    left = [p.detach().clone() for p in policy.module.parameters()]
    found |= tensors(policy, "collected")
    changed = [not torch.equal(p, whole) for p, whole in zip(left, policy.module.parameters(), strict=True)]
    found["left in parts"] = torch.tensor(any(changed))
    update(policy)
    return found | {f"adapter {name}": tensor.clone() for name, tensor in policy.adapter_tensors()}


def kept_after_updates(policy: Policy, checkpointer: Checkpointer) -> dict[str, Any]:
    """Weights that are put aside right after an update, and those of a checkpoint that is written right after another
    and read right after a third."""
    update(policy)
    found: dict[str, Any] = {f"lent {number}": tensor for number, tensor in enumerate(copy_to_host(policy))}
    update(policy)
    checkpointer.save(policy, policy.step, {})
    saved = optimizer_state(policy)
    update(policy)
    checkpointer.load(policy)
    pairs = zip(saved, optimizer_state(policy), strict=True)
    found["optimizer as saved"] = torch.tensor(all(torch.equal(before, after) for before, after in pairs))
    return found | tensors(policy, "loaded")


def optimizer_state(policy: Policy) -> list[Tensor]:
    """Copies of this rank's master weights and moments."""
    assert policy.optimizer is not None
    inner = [part.optimizer for part in policy.optimizer.chained_optimizers]
    masters = [p for each in inner for group in each.param_groups for p in group["params"]]
    moments = [v for each in inner for of in each.state.values() for v in of.values() if isinstance(v, Tensor)]
    return [tensor.detach().clone() for tensor in (*masters, *moments)]


def tensors(policy: Policy, when: str) -> dict[str, Tensor]:
    return {f"{when} {name}": tensor.detach().clone() for name, tensor in policy.hf_tensors()}


def with_small_buckets() -> None:
    settings = data_parallel.data_parallel_settings
    data_parallel.data_parallel_settings = lambda *options: replace(settings(*options), bucket_size=BUCKET)


def main(folder: Path) -> None:
    with_small_buckets()
    found = {case: found_in(folder, case) for case in CASES}
    torch.save(found, folder / f"found-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
