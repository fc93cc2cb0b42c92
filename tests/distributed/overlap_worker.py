"""One of two ranks of the test of overlapped gradient reduction, and of the padding that overlapped tensor parallelism
needs: `overlap_worker.py FOLDER`; writes FOLDER/found.pt.

FOLDER holds the checkpoints qwen3/ and qwen3_moe/.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from layout_data import LENGTHS, example_batch, example_tokens, negative_log_likelihood
from running_policy import cpu_trainer
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from millrace.data.batch import TokenBatch
from millrace.megatron.policy import Policy
from millrace.megatron.topology import init_distributed
from millrace.megatron.weights import bind, hf_tensors

CASES = {
    "dense": ("qwen3", ParallelConfig(dp=2), False, None),
    "distributed optimizer": ("qwen3", ParallelConfig(dp=2), True, None),
    "experts": ("qwen3_moe", ParallelConfig(dp=2, ep=2), False, None),
    "pipeline": ("qwen3", ParallelConfig(pp=2), True, None),
    "adapters": ("qwen3", ParallelConfig(dp=2), False, LoraConfig(rank=4)),
}


def partly_trained() -> TokenBatch:
    """Several micro-batches on each rank, and one sequence in two that carries no weight."""
    batch = example_batch()
    trained = torch.tensor([index % 2 for index in range(len(LENGTHS))])[batch.segment_ids]
    return batch.with_streams(weight=batch.streams["weight"] * trained)


Outcome = tuple[list[float], float, dict[str, Tensor]]


def trained(folder: Path, case: str, overlap: bool, deterministic: bool) -> Outcome:
    """Losses, micro-batches of a step, and the weights after it."""
    family, parallel, distributed, lora = CASES[case]
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    trainer = cpu_trainer(
        max_tokens_per_micro_batch=32,
        distributed_optimizer=distributed,
        overlap_gradient_reduction=overlap,
        deterministic=deterministic,
    )
    topology = init_distributed(parallel, trainer, seed=1)
    path = folder / family
    model = ModelConfig(path=str(path), dtype="float32", lora=lora)
    policy = Policy(
        model, ModelShape.from_hf(path), parallel, trainer, topology, optimizer=OptimizerConfig(lr=1e-3), seed=1
    )
    policy.load_hf(str(path))
    steps = [
        policy.train_step(batch, negative_log_likelihood)
        for batch in (example_batch(), partly_trained(), example_batch())
    ]
    weights = {name: tensor.detach().clone() for name, tensor in policy.hf_tensors()}
    topology.close()
    return [step["loss"] for step in steps], steps[0]["micro_batches"], weights


Seen = tuple[list[int], Tensor, Tensor, dict[str, Tensor]]


def seen_by(policy: Policy, trainer: TrainerConfig) -> Seen:
    """Tokens of each micro-batch, log-probs, logits and gradients of a policy that cuts batches as `trainer` says."""
    policy.trainer = trainer
    micro_batches = policy.cut(example_batch())
    policy.backward(micro_batches, negative_log_likelihood)
    bound = bind(policy.module, policy.shape, policy.topology, of=lambda p: p.main_grad)
    gradients = {name: gradient.clone() for name, gradient in hf_tensors(bound)}
    logp = policy.logprobs(example_batch())[0]
    return [m.input_ids.numel() for m in micro_batches], logp, policy.logits(example_tokens()), gradients


def padded(folder: Path) -> list[Seen]:
    """The same without and with every micro-batch padded to the capacity. User buffers themselves are Transformer
    Engine's, so the model is built without them."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    trainer = cpu_trainer(max_tokens_per_micro_batch=64)
    parallel, path = ParallelConfig(tp=2, sequence_parallel=True), folder / "qwen3"
    topology = init_distributed(parallel, trainer, seed=1)
    model = ModelConfig(path=str(path), dtype="float32")
    policy = Policy(model, ModelShape.from_hf(path), parallel, trainer, topology, optimizer=OptimizerConfig(), seed=1)
    policy.load_hf(str(path))
    both = [seen_by(policy, replace(trainer, overlap_tensor_parallel=overlap)) for overlap in (False, True)]
    topology.close()
    return both


def main(folder: Path) -> None:
    found = {case: [trained(folder, case, overlap, False) for overlap in (False, True)] for case in CASES}
    found["deterministic"] = [trained(folder, "experts", True, deterministic) for deterministic in (True, False)]
    found["padded"] = padded(folder)
    if os.environ["RANK"] == "0":
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
