"""One rank of the LoRA tests: runs each case's policy and writes what it computed to a file.

Usage: lora_worker.py CASES.json FOLDER; every rank writes FOLDER/CASE-RANK.pt for each case.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from layout_data import example_batch, example_tokens, negative_log_likelihood
from running_policy import copied, cpu_trainer
from torch import Tensor

from millrace.checkpoint_store import CheckpointError
from millrace.config.model_shape import ModelShape
from millrace.config.schema import LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from millrace.converters.errors import ConversionError
from millrace.megatron import lora, weights
from millrace.megatron.checkpoint import Checkpointer
from millrace.megatron.export import export_adapter, export_hf
from millrace.megatron.lent_weights import copy_to_host, put
from millrace.megatron.policy import Policy
from millrace.megatron.topology import Topology, init_distributed

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)


def main(cases: list[dict[str, Any]], folder: Path) -> None:
    for case in cases:
        os.environ["MASTER_PORT"] = str(case["port"])
        parallel = ParallelConfig(**case["parallel"])
        trainer = cpu_trainer(**case["trainer"])
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


def resume(case: dict[str, Any], parallel: ParallelConfig, trainer: TrainerConfig, topology: Topology) -> Any:
    """Two updates, a checkpoint, two more; and the last two again from the checkpoint, by a policy of its own."""
    checkpoints = Checkpointer(Path(case["folder"]) / case["name"], keep=2)
    straight = build(case, parallel, trainer, topology)
    straight.load_hf(case["model"])
    train(straight, 2)
    saved = checkpoints.save(straight, 2, {"at": 2})
    found: dict[str, Any] = {"straight": train(straight, 2), "adapters": copied(straight.adapter_tensors())}
    resumed = build(case, parallel, trainer, topology)
    assert checkpoints.load(resumed) == {"at": 2}
    found |= {"resumed": train(resumed, 2), "adapters again": copied(resumed.adapter_tensors())}
    found["same base"] = all(map(torch.equal, frozen_weights(straight), frozen_weights(resumed)))
    found["bytes"] = sum(file.stat().st_size for file in (saved / "shards").glob("*.distcp"))
    for change in ({"rank": 8}, {"targets": ["q_proj"]}):
        found[f"refused {next(iter(change))}"] = refusal(
            lambda change=change: checkpoints.load(build(case, parallel, trainer, topology, **change))
        )
    if not case["lora"].get("dropout"):
        found["lent"] = lend(resumed, checkpoints, saved)
    return found


def train(policy: Policy, steps: int) -> list[float]:
    return [policy.train_step(example_batch(), negative_log_likelihood)["loss"] for _ in range(steps)]


def lend(policy: Policy, checkpoints: Checkpointer, saved: Path) -> dict[str, Tensor]:
    """Log-probs with the weights of a checkpoint in a model's own, and in a frozen twin; and after giving back."""
    batch = example_batch()
    own, before = copy_to_host(policy), policy.logprobs(batch)[0]
    checkpoints.load_weights(policy, saved)
    theirs = policy.logprobs(batch)[0]
    put(policy, own)
    twin = policy.frozen_twin()
    checkpoints.load_weights(twin, saved)
    return {"before": before, "theirs": theirs, "after": policy.logprobs(batch)[0], "twin": twin.logprobs(batch)[0]}


def elsewhere(case: dict[str, Any], parallel: ParallelConfig, trainer: TrainerConfig, topology: Topology) -> Any:
    """The next losses from the checkpoint that another layout wrote."""
    policy = build(case, parallel, trainer, topology)
    Checkpointer(Path(case["folder"]) / case["source"], keep=2).load(policy)
    return {"losses": train(policy, 2)}


def export(case: dict[str, Any], parallel: ParallelConfig, trainer: TrainerConfig, topology: Topology) -> Any:
    """Write adapter and merged checkpoint; read the adapter back; and what is refused."""
    folder = Path(case["folder"]) / case["name"]
    policy = build(case, parallel, trainer, topology)
    policy.load_hf(case["model"])
    fill_b(policy)
    export_adapter(policy, case["model"], folder / "adapter")
    export_hf(policy, case["model"], folder / "merged")
    again = build(case, parallel, trainer, topology, adapter=str(folder / "adapter"))
    again.load_hf(case["model"])
    return {
        "written": copied(policy.adapter_tensors()),
        "read": copied(again.adapter_tensors()),
        "logits": policy.logits(example_tokens()),
        "another alpha": refusal(
            lambda: build(case, parallel, trainer, topology, alpha=3.0, adapter=str(folder / "adapter")).load_hf(
                case["model"]
            )
        ),
        "more targets": refusal(
            lambda: build(
                case, parallel, trainer, topology, targets=["all-linear"], adapter=str(folder / "adapter")
            ).load_hf(case["model"])
        ),
        "unknown target": refusal(lambda: build(case, parallel, trainer, topology, targets=["c_attn"])),
    }


def refusal(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except (CheckpointError, ConversionError) as error:
        return str(error)
    return None


def frozen(case: dict[str, Any], parallel: ParallelConfig, trainer: TrainerConfig, topology: Topology) -> Any:
    """The model without adapters, frozen: torch multiplies by frozen matrices in another order than by trained ones."""
    config = ModelConfig(path=case["model"], dtype=case["dtype"])
    policy = Policy(config, ModelShape.from_hf(config.path), parallel, trainer, topology, optimizer=None, seed=1)
    policy.load_hf(config.path)
    return {"logits": policy.logits(example_tokens())}


WORK = {"frozen": frozen, "layout": layout, "resume": resume, "elsewhere": elsewhere, "export": export}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
