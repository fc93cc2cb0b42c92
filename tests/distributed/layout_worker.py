"""One rank of the layout tests: runs each case's policy and writes what it computed to a file.

Usage: layout_worker.py CASES.json FOLDER; every rank writes FOLDER/CASE-RANK.pt for each case.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from layout_data import example_batch, example_tokens, negative_log_likelihood
from running_policy import copied, cpu_trainer, running_policy
from torch import Tensor

from millrace.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from millrace.megatron import weights
from millrace.megatron.policy import Policy


def main(cases: list[dict[str, Any]], folder: Path) -> None:
    for case in cases:
        with running_policy(
            ModelConfig(path=case["model"], dtype=case["dtype"]),
            ParallelConfig(**case["parallel"]),
            cpu_trainer(**case["trainer"]),
            optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
            port=case["port"],
        ) as policy:
            found = gradient_alone(policy, case) if case.get("gradient_alone") else results(policy, case)
            torch.save(found, folder / f"{case['name']}-{policy.topology.rank}.pt")


def results(policy: Policy, case: dict[str, Any]) -> dict[str, Any]:
    policy.load_hf(case["model"])
    batch, trainer = example_batch(), policy.trainer
    found: dict[str, Any] = {"weights": copied(policy.hf_tensors()), "logits": policy.logits(example_tokens())}
    found["logp"], found["entropy"] = policy.logprobs(batch, temperature=0.7, entropy=True)
    alone = [policy.logprobs(batch.select([n]), temperature=0.7)[0] for n in range(len(batch))]
    found["logp of each alone"] = torch.cat(alone)
    if not trainer.distributed_optimizer:  # there each rank has the sum of its own part of the gradient only
        for capacity in case["capacities"]:
            policy.trainer = replace(trainer, max_tokens_per_micro_batch=capacity)
            cut = policy.cut(batch)
            metrics = policy.backward(cut, negative_log_likelihood)
            found[f"cut {capacity}"] = {"gradients": gradients(policy), "parts": len(cut), "metrics": metrics}
        policy.trainer = trainer
        policy.backward(policy.cut(batch.select([1])), negative_log_likelihood)
        found["one sequence"] = gradients(policy)
    found["metrics"] = [policy.train_step(batch, negative_log_likelihood) for _ in range(2)]
    groups = policy.optimizer.param_groups
    found["weight decay"] = sorted({(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]})
    found["refused"] = refused_update(policy)
    found["updated"] = copied(policy.hf_tensors())
    return found


def gradient_alone(policy: Policy, case: dict[str, Any]) -> dict[str, Any]:
    policy.load_hf(case["model"])
    metrics = policy.backward(policy.cut(example_batch()), negative_log_likelihood)
    return {"gradients": gradients(policy), "metrics": metrics}


def refused_update(policy: Policy) -> str:
    """What `before_update` saw of a step that it refuses; the weights saved afterwards show that nothing happened."""

    def refuse(metrics: dict[str, float]) -> None:
        raise RuntimeError(f"refused at loss {metrics['loss']:.4f} and norm {metrics['grad_norm']:.4f}")

    try:
        policy.train_step(example_batch(), negative_log_likelihood, before_update=refuse)
    except RuntimeError as error:
        return str(error)
    return "not refused"


def gradients(policy: Policy) -> dict[str, Tensor]:
    """This rank's gradients as Hugging Face tensors."""
    bound = weights.bind(policy.module, policy.shape, policy.topology, of=attrgetter("main_grad"))
    return copied(weights.hf_tensors(bound))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
