"""One rank of the LoRA tests: runs each case's policy and writes what it computed to a file.

Usage: lora_worker.py CASES.json FOLDER; every rank writes FOLDER/CASE-RANK.pt for each case.
"""

from __future__ import annotations

import json
import os
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from layout_data import example_batch, example_tokens, negative_log_likelihood
from layout_worker import copied
from torch import Tensor

from millrace.config.model_shape import ModelShape
from millrace.config.schema import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from millrace.megatron import lora, weights
from millrace.megatron.policy import Policy
from millrace.megatron.topology import Topology, init_distributed

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def main(cases: list[dict[str, Any]], folder: Path) -> None:
    for case in cases:
        os.environ["MASTER_PORT"] = str(case["port"])
        parallel = ParallelConfig(**case["parallel"])
        trainer = TrainerConfig(device="cpu", threads_per_rank=1, collective_timeout_s=60, **case["trainer"])
        topology = init_distributed(parallel, trainer, seed=1)
        found = WORK[case["work"]](case, parallel, trainer, topology)
        torch.save(found, folder / f"{case['name']}-{topology.rank}.pt")
        topology.close()


def build(
    case: dict[str, Any], parallel: ParallelConfig, trainer: TrainerConfig, topology: Topology, **changes: Any
) -> Policy:
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in {**case["lora"], **changes}.items()}
    config = ModelConfig(path=case["model"], dtype=case["dtype"], lora=LoraConfig(**settings))
    shape = ModelShape.from_hf(case["model"])
    return Policy(config, shape, parallel, trainer, topology, optimizer=OPTIMIZER, seed=1)


def layout(case: dict[str, Any], parallel: ParallelConfig, trainer: TrainerConfig, topology: Topology) -> Any:
    """What the adapters add, their gradients, and three updates."""
    policy = build(case, parallel, trainer, topology)
    policy.load_hf(case["model"])
    batch = example_batch()
    found: dict[str, Any] = {"fresh": policy.logits(example_tokens()), "untouched": copied(policy.hf_tensors())}
    fill_b(policy)
    found |= {"adapted": policy.logits(example_tokens()), "adapters": copied(policy.adapter_tensors())}
    found |= {"merged": copied(policy.hf_tensors()), "base": frozen_weights(policy)}
    if not trainer.distributed_optimizer:
        policy.backward(policy.cut(batch), negative_log_likelihood)
        bound = lora.bind(policy.adapters, topology, of=attrgetter("main_grad"))
        found["gradients"] = copied(weights.hf_tensors(bound))
    found["metrics"] = [policy.train_step(batch, negative_log_likelihood) for _ in range(3)]
    found |= {"updated": copied(policy.adapter_tensors()), "base afterwards": frozen_weights(policy)}
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    found["trained"] = sum(p.numel() for p in trained)
    found["buffers"] = sum(p.main_grad.numel() for p in trained)
    return found


def fill_b(policy: Policy) -> None:
    """Give every B values that depend on its name alone, as if it had been trained."""
    for bound in lora.bind(policy.adapters, policy.topology):
        if bound.entry.name.endswith(".B"):
            whole = [lora._draw(name, shape, seed=5) for name, shape in bound.entry.hf.items()]
            bound.tensor.copy_(bound.entry.to_megatron(whole, bound.shards, bound.rank) * 0.2)
    policy.optimizer.reload_model_params()


def frozen_weights(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for name, p in policy.module.named_parameters() if ".lora." not in name]


WORK = {"layout": layout}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
